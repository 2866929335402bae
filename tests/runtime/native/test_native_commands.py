"""`--runtime native`: what the commands hand over, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.cli.main import main

TEXT = ("--sequences", "4", "--length", "64", "--threads", "1")
SMALL = ("--scheme", "W4A8", "--activation", "per_token", "--quantizer", "rtn", *TEXT)
SCORED = (*TEXT, "--json")
NATIVE = ("--runtime", "native", "--device", "cpu")


def qtool(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A model, and its checkpoint "w4a8" with a quantized cache."""
    folder = tmp_path_factory.mktemp("native")
    model = write_model(folder / "model", "qwen2", tied=True)
    assert qtool("quantize", model, "-o", folder / "w4a8", "--kv", "int8", *SMALL) == 0
    return folder


def test_evaluate_gives_the_perplexity_that_the_reference_gave(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for extra in ((), NATIVE):
        capsys.readouterr()
        assert qtool("evaluate", folder / "w4a8", "--reference", folder / "model", *SCORED, *extra) == 0
        output = capsys.readouterr()
        found.append(json.loads(output.out))
        assert ("w4a8_gemm" in output.err) == bool(extra)
    usual, native = found
    assert native["subject"] == "checkpoint in the native runtime on cpu"
    assert native["perplexity"] == pytest.approx(usual["perplexity"], rel=1e-3)
    assert native["reference"]["kl_nats"] == pytest.approx(usual["reference"]["kl_nats"], rel=0.05)
    assert native["perplexity"] != usual["perplexity"], "the same session ran twice"


def test_run_continues_a_text_from_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("run", folder / "w4a8", "--prompt", "water", "--max-new-tokens", "8", "--threads", "1", "--json")
    assert qtool(*asked, *NATIVE) == 0
    data = json.loads(capsys.readouterr().out)
    assert 0 < data["tokens"] <= 8
    assert data["prompt"] == "water"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("evaluate", "w4a8", "--device", "cpu"), 2, "--runtime native"),
        (("evaluate", "w4a8", "--runtime", "onnxruntime"), 2, "does not run a checkpoint"),
        (("evaluate", "w4a8", "--runtime", "native", "--device", "abacus"), 2, "abacus"),
        (("run", "w4a8", "--prompt", "x", "--runtime", "reference"), 2, "generates no text"),
        (("run", "w4a8", "--prompt", "x"), 3, "package"),
        (("run", "model", "--prompt", "x", *NATIVE), 3, "artifact"),
    ],
)
def test_what_fits_nothing_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    command, subject, *rest = arguments
    assert qtool(command, folder / subject, *rest) == code
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_fault_of_the_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("evaluate", folder / "w4a8"), ("run", folder / "w4a8", "--prompt", "x")):
        assert qtool(*command, "--runtime", "native") == 4
        message = capsys.readouterr().err
        assert "--device cuda" in message and "--device cpu" in message
