"""Rows of products: everybody has one, with a time and its comparisons or with a reason, and a wrong result is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from on_gpu.contenders import BY_NAME, OURS, PEERS, Bound
from on_gpu.floors import Peaks
from on_gpu.products import is_wrong, run_case
from on_gpu.results import show, write
from on_gpu.row_kernels import KERNELS, run_rows
from on_gpu.shapes import Case
from on_gpu.timing import Calls

CPU = torch.device("cpu")
PEAKS = Peaks(1e9, {"bf16": 1e12, "int8": 2e12, "fp8": 2e12})
CASE = Case(128, 64, 3)


def timer(calls: Mapping[str, Calls]) -> dict[str, list[float] | str]:
    """Microseconds by the length of the name."""
    return {name: [len(name) * 1e-6 * drift for drift in (1, 2, 4)] for name in calls}


def test_ratios_and_floors() -> None:
    ours, peer = BY_NAME["w8a8"], BY_NAME["torch bf16"]
    first, second = run_case(CASE, [ours, peer], CPU, timer, PEAKS)
    assert first["times_faster_than"] == {"torch bf16": pytest.approx(len("torch bf16") / len("w8a8"))}
    assert second["times_faster_than"] == {}
    size = 64 * 128 + 64 * 4 + 3 * 128 + 3 * 64 * 2
    assert first["floor_us"] == pytest.approx(size / 1e9 * 1e6) and first["bound"] == "memory"
    assert first["us"]["p20"] == pytest.approx(4 * 1.4)
    assert first["tb_per_s"] == pytest.approx(size / (first["us"]["p20"] * 1e-6) / 1e12)
    assert first["tflop_per_s"] == pytest.approx(2 * 3 * 64 * 128 / (first["us"]["p20"] * 1e-6) / 1e12)
    assert first["share_of_floor"] == pytest.approx(first["floor_us"] / first["us"]["p20"])


def test_every_contender_has_a_row_and_ours_are_right() -> None:
    rows = {row["name"]: row for row in run_case(CASE, (*OURS, *PEERS), CPU, timer, PEAKS)}
    assert list(rows) == list(BY_NAME)
    assert {name for name, row in rows.items() if "reason" in row} == {
        "torch._scaled_mm",
        "torch._scaled_mm fast",
        "torch._int_mm",
    }
    assert rows["torch._int_mm"]["reason"] == "takes M ≥ 17"


def _with(change: str, case: Case, device: torch.device, count: int) -> Bound:
    bound = BY_NAME["w4a8"].make(case, device, count)
    assert bound.expected is not None and bound.run is not None
    expected, run = bound.expected, bound.run
    changed = {
        "scale": lambda **_: run() * 1.02,
        "column": lambda **_: run().roll(1, dims=1),
        "NaN": lambda **_: run() * torch.nan,
    }
    return replace(bound, run=changed[change], expected=expected)


@pytest.mark.parametrize("change", ["scale", "column", "NaN"])
def test_a_wrong_result_is_not_timed(change: str) -> None:
    wrong = replace(BY_NAME["w4a8"], make=partial(_with, change))
    (row,) = run_case(CASE, [wrong], CPU, timer, PEAKS)
    assert is_wrong(row) and "us" not in row


def test_row_kernels_and_the_copy_beside_them() -> None:
    rows = run_rows(5, 256, CPU, timer, PEAKS)
    assert [row["name"] for row in rows] == ["copy", *(kernel.name for kernel in KERNELS)]
    assert not [row for row in rows if "reason" in row]
    assert rows[1]["floor_us"] == pytest.approx(5 * 256 * 3 / 1e9 * 1e6)


def test_the_file_has_a_row_a_line_and_the_tables_show_reasons(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = run_case(CASE, (*OURS, *PEERS), CPU, timer, PEAKS)
    rows.append({"kind": "target", "text": "W4A8", "most_us": 5.0, "name": None, "us": None, "reached": False})
    path = tmp_path / "results" / "gpu-x.json"
    write(path, {"gpu": "X", "peaks": {"copy TB/s": 4.3}}, rows, ["4096→4096 M 8"])
    found = json.loads(path.read_text())
    assert (found["gpu"], found["left_out"], len(found["rows"])) == ("X", ["4096→4096 M 8"], len(rows))
    assert found["rows"][0]["us"]["p20"] == pytest.approx(rows[0]["us"]["p20"], rel=1e-3)
    assert sum(line.startswith('  {"kind"') for line in path.read_text().splitlines()) == len(rows)
    console = Console(width=200, record=True)
    show(console, rows, ["4096→4096 M 8"])
    text = console.export_text()
    assert "torch._int_mm, M 3: takes M ≥ 17" in text
    assert "left out for want of time (1): 4096→4096 M 8" in text
    assert "not timed" in text
