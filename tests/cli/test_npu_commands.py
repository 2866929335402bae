"""`qtool export --target npu`, and what takes its package: evaluate, verify, check, npu-check, audit."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from qtool.errors import GateFailed, InputRefused, UsageError

EXPORT = ["--target", "npu", "--chunk", "8", "--context", "64", "--sequences", "4", "--length", "64", "--threads", "1"]


def run(name: str, *arguments: object) -> str:
    module = importlib.import_module(f"qtool.cli.{name}")
    result = CliRunner().invoke(module.command, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def exported(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    folder = tmp_path_factory.mktemp("npu-cli")
    model = write_model(folder / "model", "llama")
    told = json.loads(run("export", model, "-o", folder / "package", *EXPORT, "--json"))
    return model, folder / "package", told


def test_the_export_is_verified_and_says_what_it_did(exported):
    _, package, told = exported
    checks = {check["name"]: check for check in told["verification"]["checks"]}
    assert told["verification"]["passed"] and set(checks) == {"rules", "model", "decode"}
    assert len(told["npu"]["rounded_at_export"]) == 15 and told["npu"]["node_types"] == {"uint16": 106}
    assert {path.name for path in package.iterdir()} >= {
        "prefill.onnx", "decode.onnx", "npu.data", "npu.json", "ranges.json", "answers.safetensors", "tokenizer.json",
    }
    assert not (package / "calibration").exists()
    card = (package / "README.md").read_text()
    assert ", quantized, for the QNN" in card and "| linears in W8 per channel, rounded at export | 15 |" in card


def test_evaluate_scores_the_simulated_package(exported):
    model, package, _ = exported
    scored = json.loads(
        run("evaluate", package, "--reference", model, "--sequences", 2, "--length", 48, "--threads", 1, "--json")
    )
    reference = scored["reference"]
    assert abs(scored["perplexity"] / reference["perplexity"] - 1) < 0.03
    assert 0 < reference["kl_nats"] < 0.01
    with pytest.raises(UsageError, match="fixed in its graphs"):
        run("evaluate", package, "--sequences", 1, "--length", 65, "--threads", 1)


def test_verify_and_check_take_the_package(exported, tmp_path):
    _, package, _ = exported
    assert "prefill of 8 tokens, decode of 1, 64 slots" in run("inspect", package)
    verified = json.loads(run("verify", package, "--threads", 1, "--json"))
    assert verified["passed"] and {check["name"] for check in verified["checks"]} == {"rules", "answers", "decode"}
    gate = [package, "--baseline", tmp_path / "baseline.json", "--sequences", 8, "--length", 64, "--threads", 1]
    run("check", *gate, "--update-baseline")
    assert json.loads(run("check", *gate, "--json"))["passed"]


def test_run_generates_with_the_package(exported):
    _, package, _ = exported
    told = json.loads(run("run", package, "--prompt", "abc", "--max-new-tokens", 4, "--threads", 1, "--json"))
    assert told["prompt"] == "abc" and 1 <= told["tokens"] <= 4


def test_a_changed_package_is_refused(exported, tmp_path):
    _, package, _ = exported
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in package.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "npu.json").write_bytes((package / "npu.json").read_bytes() + b" ")
    with pytest.raises(InputRefused, match=r"npu\.json"):
        run("audit", changed, "--length", 32, "--threads", 1)


def test_npu_check_passes_the_package_and_blames_a_foreign_graph(exported, tmp_path):
    _, package, _ = exported
    assert run("npu_check", package).count("keeps all") == 2
    model = onnx.load(str(package / "decode.onnx"), load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "tokens"
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(model.SerializeToString())
    with pytest.raises(GateFailed, match="static-shape: input_ids"):
        run("npu_check", foreign)


def test_audit_prints_every_kind_and_fails_on_saturation(exported):
    _, package, _ = exported
    common = [package, "--sequences", 2, "--length", 64, "--threads", 1]
    printed = run("audit", *common, "--max-saturation", 1)
    for kind in ("SwiGLU product", "residual stream", "logits", "attention scores"):
        assert kind in printed
    told = json.loads(run("audit", *common, "--max-saturation", 1, "--json"))
    assert told["calibrated_length"] == 64 and len(told["tensors"]) > 50
    assert told["worst"]["share"] > 0
    with pytest.raises(GateFailed, match="lie outside"):
        run("audit", *common, "--max-saturation", 0)


@pytest.mark.parametrize(
    ("scheme", "largest_increase"),
    [
        (["W4A16", "--group-size", "channel", "--lm-head", "W8A16"], 1e-3),
        (["W8A8", "--activation", "per_tensor"], 0.02),
    ],
)
def test_a_rotated_checkpoint_keeps_its_codes_and_its_score(scheme, largest_increase, exported, tmp_path):
    model, _, _ = exported
    checkpoint, text = tmp_path / "checkpoint", ["--sequences", "4", "--length", "64", "--threads", "1"]
    run("quantize", model, "-o", checkpoint, "--scheme", *scheme, "--rotate", "--quantizer", "rtn", *text)
    told = json.loads(run("export", checkpoint, "-o", tmp_path / "package", *EXPORT, "--json"))
    numbers = next(check["numbers"] for check in told["verification"]["checks"] if check["name"] == "model")
    assert abs(numbers["loss_increase"]) < largest_increase
    assert told["npu"]["rounded_at_export"] == []
    assert ("uint8" in told["npu"]["node_types"]) == (scheme[0] == "W8A8")


def test_options_of_the_npu_alone_are_refused_elsewhere(exported, tmp_path):
    model, _, _ = exported
    with pytest.raises(UsageError, match=r"--chunk: is no option of target cpu"):
        run("export", model, "-o", tmp_path / "out", "--chunk", 8)
