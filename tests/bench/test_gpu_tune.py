"""Tuning: the fastest candidate takes the table's place when it is faster by more than the spread, and only there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from on_gpu import config_files, tune, tune_compile
from on_gpu.budget import Budget, run_in_order
from on_gpu.config_files import Place
from on_gpu.contenders import BY_NAME, OURS, Contender
from on_gpu.shapes import Case
from on_gpu.timing import Calls

CPU = torch.device("cpu")
FOLDERS = sorted({contender.folder for contender in OURS})


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of all tables of tilings, in place of the real ones."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        shutil.copy(config_files.path_of(folder), tmp_path / folder)
    monkeypatch.setattr(config_files, "KERNELS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_unchanged_table_is_written_as_it_was(folder: str, tables: Path) -> None:
    path = config_files.path_of(folder)
    before = path.read_bytes()
    config_files.write(path, config_files.read(path))
    assert path.read_bytes() == before


def times(**seconds: float | str) -> dict[str, list[float] | str]:
    """Three rounds with 2 % of spread around each."""
    return {
        name: each if isinstance(each, str) else [each * 0.99, each, each * 1.01] for name, each in seconds.items()
    }


def test_only_what_is_faster_by_more_than_the_spread_is_chosen() -> None:
    shapes = [times(current=10.0, a=9.0, b=8.0), times(current=10.0, a=9.0, b=9.0)]
    name, faster, margin = tune.choose("current", shapes)
    assert name == "b" and faster == pytest.approx((10 / 8 * 10 / 9) ** 0.5) and margin == pytest.approx(0.012)
    assert tune.choose("current", [times(current=10.0, a=9.95)])[0] is None
    noisy = {"current": [8.0, 10.0, 12.0], "a": [9.0, 9.0, 9.0]}
    assert tune.choose("current", [noisy])[0] is None


def test_a_candidate_that_fails_anywhere_is_none_and_nothing_replaces_an_untimed_row() -> None:
    assert tune.choose("current", [times(current=10.0, a=1.0), times(current=10.0, a="out of memory")])[0] is None
    assert tune.choose("current", [times(current="out of memory", a=1.0)])[0] is None
    assert tune.choose("current", [times(current=10.0)]) == (None, 1.0, 0.0)


@pytest.mark.parametrize("contender", OURS, ids=lambda contender: contender.name)
def test_candidates_of_every_place_differ_from_the_row_and_have_compile_cases(contender: Contender) -> None:
    rows = config_files.read(config_files.path_of(contender.folder))
    places = config_files.places(rows, contender.folder, contender.form, "sm_90")
    assert [place.largest_m for place in places] == [16, 32, 64, None]
    for place in places:
        current = config_files.row_of(rows, place)
        found = tune.candidates(current, contender.folder)
        assert found and current not in found
        assert len({json.dumps(row) for row in found}) == len(found)
        assert {key for row in found for key in row} <= set(current)
    case = tune_compile.case_of(contender, "sm_90", found[0])
    tile = {case.constexprs.get("BM", case.constexprs.get("BLOCK_M")), case.num_warps, case.num_stages}
    assert tile == {found[0][key] for key in found[0] if key in ("tile_m", "block_m")} | {
        found[0].get("warps", found[0].get("num_warps")),
        found[0].get("stages", found[0].get("num_stages")),
    }


def faster_with(**wanted: Any) -> Any:
    """A timer for which tilings with these fields take half as long; the others all the same."""

    def timer(calls: Mapping[str, Calls]) -> dict[str, list[float] | str]:
        found: dict[str, list[float] | str] = {}
        for name, each in calls.items():
            tiling = each.run.keywords["tiling"]  # type: ignore[attr-defined]
            better = all(getattr(tiling, field) == value for field, value in wanted.items())
            found[name] = [5e-6 if better else 1e-5] * 3
        return found

    return timer


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SHAPES", ((256, 64),))
    monkeypatch.setattr(tune, "SPLIT_SHAPES", ((1024, 64),))
    monkeypatch.setattr(tune, "MANY", (20,))


def accept(contender: Contender, target: str, rows: Sequence[Any], cases: Sequence[Case]) -> list[str]:
    return [""] * len(rows)


def test_a_refused_candidate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    contender = BY_NAME["w4a8"]
    place = Place("w4a8_gemm", "channel", "sm_90", 16)
    current = config_files.row_of(config_files.read(config_files.path_of("w4a8_gemm")), place)

    def refuse(contender: Contender, target: str, rows: Sequence[Any], cases: Sequence[Case]) -> list[str]:
        return ["12 spills" if row["num_stages"] == 5 else "" for row in rows]

    kept = tune.tune_place(contender, place, current, CPU, faster_with(num_stages=5), refuse)
    assert kept.chosen is None and kept.refused == 4
    chosen = tune.tune_place(contender, place, current, CPU, faster_with(num_stages=3), refuse)
    assert chosen.chosen is not None and chosen.chosen["num_stages"] == 3


def test_an_integer_table_takes_the_tile_and_then_a_shapes_split(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    contender = BY_NAME["w4a8 g128"]
    path = config_files.path_of("w4a8_gemm")
    before = config_files.read(path)
    works = tune.works(CPU, "sm_90", faster_with(block_n=64), accept, [contender])
    rows, _ = run_in_order([work for work in works if work.kind == "tile"], Budget(1000))
    assert [row["chosen"]["block_n"] for row in rows] == [64] * 4
    after = config_files.read(path)
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert {(row["target"], row["form"]) for row in changed} == {("sm_90", "integer")} and len(changed) == 4
    assert [list(row) for row in after] == [list(row) for row in before]

    splits = tune.works(CPU, "sm_90", faster_with(split_k=4), accept, [contender])
    run_in_order([work for work in splits if work.kind == "split"], Budget(1000))
    special = [row for row in config_files.read(path) if "n" in row]
    assert [(row["largest_m"], row["n"], row["k"], row["split_k"]) for row in special] == [
        (16, 64, 1024, 4),
        (64, 64, 1024, 4),
    ]
    # They stand in front of the row they narrow, which is how the first that fits is found.
    rows_now = config_files.read(path)
    assert rows_now.index(special[0]) + 1 == rows_now.index(
        next(row for row in rows_now if row["form"] == "integer" and row.get("largest_m") == 16 and "n" not in row)
    )
    # Another tile makes what a shape had to itself void.
    place = Place("w4a8_gemm", "integer", "sm_90", 16)
    again = config_files.with_choice(rows_now, place, {"block_n": 256})
    assert [row["largest_m"] for row in again if "n" in row] == [64]


def test_a_float_tables_shared_row_is_parted(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    path = config_files.path_of("fp8_gemm")
    before = config_files.read(path)
    works = tune.works(CPU, "sm_90", faster_with(tile_n=64, warps=4, weights_first=True), accept, [BY_NAME["fp8"]])
    run_in_order(works[:1], Budget(1000))
    after = config_files.read(path)
    assert len(after) == len(before) + 1 and after[2:] == before[1:]
    assert (after[0]["forms"], after[0]["tile_n"], after[0]["up_to_m"]) == (["row"], 64, 16)
    assert after[1] == {**before[0], "forms": ["fast", "block"]}
    assert list(after[0]) == list(before[0])
