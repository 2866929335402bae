"""`qtool bench`: rows for every model, ratios to the first, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.cli.main import main

SMALL = ("--prompt", "8", "--new", "2", "--rounds", "2", "--threads", "1")
NATIVE = ("--runtime", "native", "--device", "cpu")


def qtool(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A model, its checkpoint and its package."""
    folder = tmp_path_factory.mktemp("bench")
    model = write_model(folder / "model", "llama", tied=True)
    scheme = ("--scheme", "W4A8", "--quantizer", "rtn", "--threads", "1")
    assert qtool("quantize", model, "-o", folder / "checkpoint", *scheme) == 0
    assert qtool("export", folder / "checkpoint", "-o", folder / "package", "--threads", "1") == 0
    return folder


def test_models_stand_side_by_side_and_the_first_is_the_measure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    models = [str(folder / name) for name in ("checkpoint", "package", "model", "checkpoint")]
    assert qtool("bench", *models, *SMALL, *NATIVE, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert [data[key] for key in ("prompt", "new", "batch", "rounds")] == [8, 2, 1, 2]
    rows = data["models"]
    assert [row["model"] for row in rows] == models
    for row, runtime in zip(rows, ("native", "onnxruntime", "native", "native"), strict=True):
        assert runtime in row["description"]
        assert row["decode_tokens_per_s"]["low"] > 0 and row["prefill_tokens_per_s"]["low"] > 0
    one = {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows[0]["prefill_ratio_to_first"] == rows[0]["decode_ratio_to_first"] == one
    assert rows[3]["decode_ratio_to_first"] != one, "the same model again is timed again"


def test_a_table_of_a_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert qtool("bench", folder / "checkpoint", *SMALL, "--batch", "3") == 0
    table = capsys.readouterr().out
    assert "3 sequences of 8 + 2 tokens" in table
    assert "checkpoint in the torch reference" in table
    assert "× the first" not in table


@pytest.mark.parametrize(
    ("models", "options", "code", "words"),
    [
        (("package",), ("--batch", "2"), 2, "one sequence"),
        (("checkpoint",), ("--runtime", "onnxruntime"), 2, "does not run a checkpoint"),
        (("package",), NATIVE, 2, "does not run a package"),
        (("checkpoint",), ("--device", "cpu"), 2, "--runtime native"),
        (("package",), ("--prompt", "300"), 2, "context is 256"),
        ((), (), 2, "MODEL"),
    ],
)
def test_what_fits_nothing_is_refused(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    models: tuple[str, ...],
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    assert qtool("bench", *(folder / model for model in models), *options) == code
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_fault_of_the_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qtool("bench", folder / "checkpoint", "--runtime", "native") == 4
    assert "--device cpu" in capsys.readouterr().err
