"""The whole line on a tiny model, through the command line: every artifact, every gate, every exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qtool.cli.main import main
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.manifest import MANIFEST, hash_file, read_manifest

SMALL = ("--sequences", "4", "--length", "64", "--threads", "1")
SCORED = ("--sequences", "8", "--length", "200", "--threads", "1")
LIMITS = ("--max-perplexity-increase", "0.1", "--max-kl", "0.3")


def qtool(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A folder with model, statistics, checkpoint and package of one small run."""
    folder = tmp_path_factory.mktemp("line")
    model = write_model(folder / "model")
    # A text of the test's own: what a tiny random model's few roundings do must not change with the built-in one.
    text = folder / "calibration.txt"
    text.write_text("\n\n".join(f"In {year} the river rose {year % 7} feet and fell." for year in range(1800, 2000)))
    assert qtool("measure", model, "-o", folder / "stats", *SMALL) == 0
    scheme = ("--scheme", "W4A8", "--group-size", "32", "--text", text)
    assert qtool("quantize", model, "-o", folder / "checkpoint", *scheme, *SMALL) == 0
    assert qtool("export", folder / "checkpoint", "-o", folder / "package", "--threads", "1") == 0
    return folder


def test_the_artifacts_name_their_parents(line: Path) -> None:
    stats, checkpoint, package = (read_manifest(line / name) for name in ("stats", "checkpoint", "package"))
    assert stats.parent("model") == checkpoint.parent("model") == package.parent("model")
    assert package.parent("checkpoint") == checkpoint.digest
    assert (line / "checkpoint" / "recipe.yaml").read_bytes() == (line / "package" / "recipe.yaml").read_bytes()
    assert json.loads((line / "package" / "verification.json").read_text())["passed"] is True


def test_evaluate_run_inspect_verify(line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert qtool("evaluate", line / "package", "--reference", line / "model", "-o", report, "--json", *SCORED) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["reference"]["kl_nats"] > 0
    assert qtool("evaluate", line / "checkpoint", "--json", *SCORED) == 0
    by_reference = json.loads(capsys.readouterr().out)
    assert by_reference["perplexity"] == pytest.approx(scored["perplexity"], rel=0.02)
    assert qtool("run", line / "package", "--prompt", "Hello", "--max-new-tokens", "5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 5
    for artifact in (line / "stats", line / "checkpoint", line / "package", report):
        assert qtool("inspect", artifact) == 0
        assert qtool("inspect", artifact, "--json") == 0
    for artifact in (line / "stats", line / "checkpoint", line / "package"):
        assert qtool("verify", artifact) == 0


def test_the_gate_passes_fails_and_refuses(line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = tmp_path / "baseline.json"
    assert qtool("check", line / "package", "--baseline", baseline, *SCORED) == 2
    assert qtool("check", line / "package", "--baseline", baseline, "--update-baseline", *SCORED) == 0
    junit = tmp_path / "gate.xml"
    assert qtool("check", line / "package", "--baseline", baseline, "--junit", junit, *LIMITS, *SCORED) == 0
    assert 'failures="0"' in junit.read_text()
    assert qtool("check", line / "package", "--baseline", baseline, "--sequences", "7", "--length", "200") == 3
    data = json.loads(baseline.read_text())
    losses = data["losses"]
    baseline.write_text(json.dumps({**data, "losses": losses[: len(losses) // 2]}))
    assert qtool("check", line / "package", "--baseline", baseline, *SCORED) == 3
    capsys.readouterr()


def test_outputs_are_never_overwritten(line: Path) -> None:
    before = hash_file(line / "package" / MANIFEST)
    assert qtool("export", line / "checkpoint", "-o", line / "package") == 2
    assert qtool("measure", line / "model", "-o", line / "stats", *SMALL) == 2
    assert hash_file(line / "package" / MANIFEST) == before


def test_a_flipped_bit_is_refused(line: Path, tmp_path: Path) -> None:
    for kind in ("checkpoint", "package"):
        copy = tmp_path / kind
        shutil.copytree(line / kind, copy)
        victim = max(copy.glob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
        assert qtool("verify", copy) == 3
        assert qtool("evaluate", copy, *SCORED) == 3
    assert qtool("run", copy, "--prompt", "x") == 3
    assert qtool("export", tmp_path / "checkpoint", "-o", tmp_path / "out") == 3
    assert not (tmp_path / "out").exists()


def test_one_scale_changed_by_a_percent_fails_verify_and_check(line: Path, tmp_path: Path) -> None:
    """The manifest is made to fit again, so that only the arithmetic can tell."""
    baseline = tmp_path / "baseline.json"
    assert qtool("check", line / "package", "--baseline", baseline, "--update-baseline", *SCORED) == 0
    copy = tmp_path / "package"
    shutil.copytree(line / "package", copy)
    model = onnx.load(copy / "model.onnx")
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    scale = next(t for t in model.graph.initializer if t.name == node.input[2])
    values = numpy_helper.to_array(scale).copy()
    values.reshape(-1)[values.size // 3] *= np.float32(1.01)
    scale.CopyFrom(numpy_helper.from_array(values, scale.name))
    (copy / "model.onnx.data").unlink()
    onnx.save(model, copy / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    manifest = read_manifest(copy)
    files = {name: hash_file(copy / name) for name in manifest.files}
    (copy / MANIFEST).write_bytes(manifest.model_copy(update={"files": files}).to_bytes())
    assert qtool("verify", copy) == 5
    assert qtool("check", copy, "--baseline", baseline, *LIMITS, *SCORED) == 5


def test_static_activations_take_statistics_of_this_model_or_measure(
    line: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    scheme = ("--scheme", "W8A8", "--activation", "per_tensor", "--quantizer", "rtn")
    assert qtool("quantize", line / "model", "-o", tmp_path / "a", *scheme, *SMALL) == 0
    other = tiny_model(seed=1)
    assert qtool("quantize", other, "-o", tmp_path / "b", *scheme, "--statistics", line / "stats") == 3
    assert qtool("quantize", line / "model", "-o", tmp_path / "c", *scheme, "--statistics", line / "stats") == 0
    assert qtool("export", tmp_path / "c", "-o", tmp_path / "d") == 2  # no CPU kernel computes it
    assert not any((tmp_path / name).exists() for name in "bd")
    found = [QuantizedCheckpoint(tmp_path / name).quantized("model.layers.0.mlp.down_proj") for name in "ac"]
    scales = [float(tensor.input_scale) for tensor in found if tensor.input_scale is not None]
    assert scales[0] == pytest.approx(scales[1], rel=0.5)  # of two texts


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--activation", "per_tensor", "--rotate"), "of the model as it is"),
        (("--activation", "per_tensor", "--auto"), "of the model as it is"),
        (("--activation", "per_tensor", "--transform", "hadamard"), "this recipe has none"),
        ((), "this recipe has none"),
    ],
    ids=["rotated", "planned", "transformed", "dynamic"],
)
def test_statistics_that_nothing_would_read_are_refused_at_once(
    line: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: tuple[str, ...], words: str
) -> None:
    given = ("--scheme", "W8A8", "--quantizer", "rtn", *asked, "--statistics", line / "stats")
    assert qtool("quantize", line / "model", "-o", tmp_path / "out", *given) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_scoring_text_that_was_calibrated_on_is_refused(line: Path, tmp_path: Path) -> None:
    from qtool.quantize.inputs import builtin_text

    checkpoint = tmp_path / "checkpoint"
    assert qtool("quantize", line / "model", "-o", checkpoint, "--scheme", "W4A8", "--group-size", "32", *SMALL) == 0
    text = tmp_path / "same.txt"
    text.write_text(builtin_text("calibration")[:4000], encoding="utf-8")
    assert qtool("evaluate", checkpoint, "--text", text, "--sequences", "2", "--length", "32") == 3


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family_goes_down_the_line(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model(family, tied=family != "mistral")
    scheme = ("--scheme", "W8A8", "--group-size", "32", "--activation", "per_token_group")
    assert qtool("quantize", model, "-o", tmp_path / "checkpoint", *scheme, *SMALL) == 0
    assert qtool("export", tmp_path / "checkpoint", "-o", tmp_path / "package", "--threads", "1") == 0
    assert qtool("evaluate", tmp_path / "package", "--reference", model, *SCORED) == 0


def test_a_weight_that_is_not_finite_is_refused_at_once(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = tiny_model()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors")
    assert qtool("quantize", model, "-o", tmp_path / "checkpoint", "--scheme", "W4A8", *SMALL) == 3
    assert not list(tmp_path.glob("*checkpoint*"))


@pytest.mark.parametrize("options", [("--rotate",), ("--smooth", "0.6")])
def test_offline_transforms_go_down_the_line(options: tuple[str, ...], line: Path, tmp_path: Path) -> None:
    scheme = ("--scheme", "W4A8", "--group-size", "32", *options, *SMALL)
    assert qtool("quantize", line / "model", "-o", tmp_path / "checkpoint", *scheme) == 0
    assert qtool("export", tmp_path / "checkpoint", "-o", tmp_path / "package") == 0
    report = tmp_path / "report.json"
    assert qtool("evaluate", tmp_path / "package", "--reference", line / "model", *SCORED, "-o", report) == 0
    assert json.loads(report.read_text())["reference"]["kl_nats"] < 0.1
    recipe = (tmp_path / "checkpoint" / "recipe.yaml").read_text()
    assert ("rotate" if "--rotate" in options else "smooth_alpha: 0.6") in recipe


def test_online_transforms_are_scored_and_not_exported(line: Path, tmp_path: Path) -> None:
    scheme = ("--scheme", "W4A4", "--transform", "quad", "--rank", "8", "--low-rank", "4", *SMALL)
    assert qtool("quantize", line / "model", "-o", tmp_path / "checkpoint", *scheme) == 0
    assert qtool("evaluate", tmp_path / "checkpoint", *SCORED) == 0
    assert qtool("export", tmp_path / "checkpoint", "-o", tmp_path / "package") == 2
