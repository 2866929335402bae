"""`qtool plan --dry-run` foretells what `qtool quantize` writes and holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qtool.cli import foretold
from qtool.cli.main import main
from qtool.quantize.artifacts import tensor_file
from qtool.quantize.artifacts.stored_scale import STORED_SCALES
from qtool.quantize.inputs.source_model import SourceModel
from qtool.quantize.measure import backwards
from qtool.quantize.planner import forecast, forecast_distillation, forecast_refinement, forecast_weighing
from qtool.quantize.planner.forecast_size import SCALES
from qtool.quantize.quantizers import block_refinement, distill, gptq, pipeline, token_weights

Make = Callable[..., Path]
TEXT = "".join(f"Line {i} says {i * 7919 % 1000}.\n" for i in range(400))
SCHEMES = {
    "W4A16": ("--scheme", "W4A16"),
    "zero points": ("--scheme", "W4A8", "--asymmetric", "--group-size", "32"),
    "float head": ("--scheme", "W4A8", "--group-size", "32", "--lm-head", "float", "--quantizer", "rtn"),
    "quad": ("--scheme", "W4A4", "--group-size", "32", "--transform", "quad", "--rank", "8"),
    "hadamard, low rank": ("--scheme", "W4A8", "--group-size", "32", "--transform", "hadamard", "--low-rank", "4"),
    "frozen": ("--scheme", "W4A4", "--group-size", "32", "--runtime-smooth", "frozen"),
    "weighed": ("--scheme", "W4A8", "--token-weights", "gradient", "--group-size", "32"),
    "distilled": ("--scheme", "W4A8", "--group-size", "32", "--quantizer", "rtn", "--distill", "1"),
    "static": ("--scheme", "W8A8", "--activation", "per_tensor"),
    "FP8": ("--scheme", "FP8_DYNAMIC"),
    "MXFP4": ("--scheme", "MXFP4"),
    "integers": ("--scheme", "W4A8", "--scale", "integer", "--group-size", "32"),
    "shifts": ("--scheme", "W4A16", "--scale", "shift", "--group-size", "32"),
    "rotated": ("--scheme", "W4A8", "--rotate", "--group-size", "32"),
    "smooth": ("--scheme", "W8A8", "--smooth", "0.5"),
    "some float": ("--scheme", "W4A8", "--ignore", "*.down_proj", "--group-size", "32"),
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """`main` sets the process's signal handlers and threads; put them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(foretold, "matrix_speed", lambda threads: 1e11)

    def command(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--text", str(tmp_path / "text.txt"), "--sequences", "4", "--length", "64"])
        assert isinstance(stopped.value.code, int)
        printed = capsys.readouterr()
        return stopped.value.code, printed.out or printed.err

    return command


@pytest.mark.parametrize(
    "name, family, tied",
    [(name, ("llama", "qwen2", "mistral", "qwen3")[i % 4], i % 3 > 0) for i, name in enumerate(SCHEMES)],
)
def test_the_size_is_what_is_written(
    run: Callable[..., tuple[int, str]], tiny_model: Make, tmp_path: Path, name: str, family: str, tied: bool
) -> None:
    model, options = str(tiny_model(family, tied=tied)), SCHEMES[name]
    code, printed = run("plan", model, "--dry-run", *options, "--json")
    assert code == 0, printed
    foretold = json.loads(printed)
    code, printed = run("quantize", model, "-o", str(tmp_path / "out"), *options, "--threads", "1")
    assert code == 0, printed
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    whole = sum(path.stat().st_size for path in files)
    assert foretold["size_bytes"] == pytest.approx(whole, rel=0.05)
    shards = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    assert foretold["weights_bytes"] < shards < 1.1 * foretold["weights_bytes"]


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_the_tensors_are_counted_to_the_byte(
    run: Callable[..., tuple[int, str]], tiny_model: Make, tmp_path: Path, family: str
) -> None:
    from safetensors.numpy import load_file

    model, options = str(tiny_model(family)), SCHEMES["quad"]
    foretold = json.loads(run("plan", model, "--dry-run", *options, "--json")[1])
    assert run("quantize", model, "-o", str(tmp_path / "out"), *options, "--threads", "1")[0] == 0
    shards = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert foretold["weights_bytes"] == sum(array.nbytes for shard in shards for array in shard.values())


@pytest.mark.parametrize("family, tied, name", [("llama", True, "W4A16"), ("qwen2", False, "float head")])
def test_the_weights_of_the_package(
    run: Callable[..., tuple[int, str]], tiny_model: Make, tmp_path: Path, family: str, tied: bool, name: str
) -> None:
    model, options = str(tiny_model(family, tied=tied)), SCHEMES[name]
    told = json.loads(run("plan", model, "--dry-run", *options, "--json")[1])
    assert run("quantize", model, "-o", str(tmp_path / "out"), *options, "--threads", "1")[0] == 0
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "out"), "-o", str(tmp_path / "package")])
    assert stopped.value.code == 0
    written = (tmp_path / "package" / "model.onnx.data").stat().st_size
    assert told["package_weights_bytes"] == pytest.approx(written, rel=0.05)


def test_no_weight_is_read(
    run: Callable[..., tuple[int, str]], tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    model = str(tiny_model())
    for name in ("read", "read_rows"):
        monkeypatch.setattr(SourceModel, name, refuse)
    code, printed = run("plan", model, "--dry-run", "--scheme", "W4A8")
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()][:2] == ["checkpoint", "package"]
    assert "within a factor of two" in printed


def test_the_forecast_counts_with_the_runs_own_numbers() -> None:
    """It repeats them, because it must not import torch."""
    assert forecast.ROWS_AT_ONCE == gptq.CHUNK_ROWS
    assert (forecast.LARGE_ELEMENTS, forecast.PIECE_ELEMENTS) == (
        tensor_file.LARGE_ELEMENTS,
        tensor_file.PIECE_ELEMENTS,
    )
    assert (forecast_refinement.PROBES, forecast_refinement.LOOKS, forecast_refinement.LOOKED_AT) == (
        block_refinement.PROBES,
        block_refinement.LOOKS,
        block_refinement.LOOKED_AT,
    )
    assert forecast_weighing.STATES_BYTES == token_weights.STATES_BYTES
    assert forecast_weighing.HEAD_ROWS == backwards.HEAD_ROWS
    assert forecast_distillation.HELD_BACK == distill.HELD_BACK
    assert pipeline.HEAD_PIECE_ELEMENTS == forecast.PIECE_ELEMENTS
    for name, form in STORED_SCALES.items():
        for n, g in ((3, 1), (4, 7)):
            assert {key: shape for key, (_, shape) in SCALES[name](n, g, True).items()} == form.shapes(n, g)


def test_as_much_text_is_assumed_as_quantize_would_read(
    run: Callable[..., tuple[int, str]], tiny_model: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model())

    def operations(*options: str) -> float:
        with pytest.raises(SystemExit) as stopped:
            main(["plan", model, "--dry-run", "--scheme", "W4A8", "--json", *options])
        assert stopped.value.code == 0
        return float(json.loads(capsys.readouterr().out)["operations"])

    assert operations() == operations("--sequences", "64") > operations("--sequences", "32")


def test_without_dry_run_it_is_refused(run: Callable[..., tuple[int, str]], tiny_model: Make) -> None:
    assert run("plan", str(tiny_model()), "--scheme", "W4A8")[0] == 2


def test_more_work_takes_longer(run: Callable[..., tuple[int, str]], tiny_model: Make) -> None:
    small, large = tiny_model(), tiny_model(num_hidden_layers=8)

    def operations(model: Path, *options: str) -> float:
        found: float = json.loads(run("plan", str(model), "--dry-run", "--scheme", "W4A8", "--json", *options)[1])[
            "operations"
        ]
        return found

    assert operations(small) < operations(large)
    assert operations(small, "--quantizer", "rtn") < operations(small) < operations(small, "--quantizer", "autoround")


# A process counts its parent's memory at its start as its own peak: the parent must be a small one, not the tests.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


PEAKS = {
    "gptq": ("--scheme", "W4A8"),
    "rtn": ("--scheme", "FP8_DYNAMIC", "--quantizer", "rtn"),
    "quad": ("--scheme", "W4A4", "--transform", "quad", "--rank", "8"),
    "low rank": ("--scheme", "W4A8", "--low-rank", "16"),
    "smooth": ("--scheme", "W8A8", "--smooth", "0.5"),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_memory_is_what_a_process_reaches(tiny_model: Make, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 2)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_model(num_hidden_layers=1, vocab_size=4000, **sizes)
    options = [*PEAKS[name], "--text", str(tmp_path / "text.txt")]
    options += ["--sequences", "4", "--length", "128", "--threads", "1", "--json"]
    program = [sys.executable, "-P", "-m", "qtool.cli"]
    planned = subprocess.run([*program, "plan", str(model), "--dry-run", *options], check=True, capture_output=True)
    command = [*program, "quantize", str(model), "-o", str(tmp_path / "out"), *options]
    measured = subprocess.run([sys.executable, "-P", "-c", PEAK, *command], check=True, capture_output=True)
    assert json.loads(planned.stdout)["peak_memory_bytes"] == pytest.approx(int(measured.stdout) * 1024, rel=0.25)
