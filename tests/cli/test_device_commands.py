"""`qtool export --target cuda` and `--target tensorrt`, what takes their packages, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from qtool.errors import GateFailed, InputRefused, UsageError

CALIBRATION = ["--quantizer", "rtn", "--sequences", "2", "--length", "32", "--threads", "1"]
SCHEMES = {
    "w4": ["--scheme", "W4A16"],
    "w8": ["--scheme", "W8A16"],
    "w4a8": ["--scheme", "W4A8"],
    "w8a8": ["--scheme", "W8A8"],
    "fp8": ["--scheme", "FP8_DYNAMIC", "--activation", "per_tensor"],
    "fp8_dynamic": ["--scheme", "FP8_DYNAMIC"],
    "int8": ["--scheme", "W8A8", "--activation", "per_tensor"],
    "small_groups": ["--scheme", "W4A16", "--group-size", "32"],
    "asymmetric": ["--scheme", "W4A16", "--asymmetric"],
    "kv": ["--scheme", "W4A16", "--kv", "int8"],
    "hadamard": ["--scheme", "W4A16", "--transform", "hadamard"],
}
CUDA_FILES = {"model.onnx", "model.onnx.data", "genai_config.json", "session.json", "README.md", "verification.json"}
TRT_FILES = {"model.onnx", "model.onnx.data", "profiles.json", "trtexec.txt", "session.json", "README.md"}


def run(name: str, *arguments: object) -> str:
    module = importlib.import_module(f"qtool.cli.{name}")
    result = CliRunner().invoke(module.command, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("device-cli") / "model", "qwen2", intermediate_size=128)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Callable[[str], Path]:
    """checkpoint(key of SCHEMES) -> folder."""

    def make(name: str) -> Path:
        folder = model.parent / name
        if not folder.exists():
            run("quantize", model, "-o", folder, *SCHEMES[name], *CALIBRATION)
        return folder

    return make


@pytest.fixture(scope="module")
def package(model: Path, checkpoint: Callable[[str], Path]) -> Callable[[str, str], tuple[Path, dict]]:
    """package(target, key of SCHEMES) -> folder, what --json told."""
    told: dict[tuple[str, str], dict] = {}

    def make(target: str, name: str) -> tuple[Path, dict]:
        output = model.parent / f"{target}-{name}"
        if (target, name) not in told:
            more = ["--context", 128, "--chunk", 32] if target == "tensorrt" else []
            text = run("export", checkpoint(name), "-o", output, "--target", target, *more, "--threads", 1, "--json")
            told[target, name] = json.loads(text)
        return output, told[target, name]

    return make


PACKAGES = [("cuda", "w4"), ("cuda", "w8"), ("tensorrt", "w4"), ("tensorrt", "fp8"), ("tensorrt", "int8")]


@pytest.mark.parametrize(("target", "name"), PACKAGES)
def test_the_export_is_checked_and_says_that_it_was_not_run(target, name, package):
    folder, told = package(target, name)
    checks = {check["name"]: check for check in told["verification"]["checks"]}
    expected = ["checker", "form", "weights", "range", "model", "decode", *(["genai"] if target == "cuda" else [])]
    assert told["verification"]["passed"] and list(checks) == expected
    assert all(check["outcome"] == "pass" for check in checks.values())
    assert told["ran_on_device"] is False
    details = json.loads((folder / "manifest.json").read_text())["details"]
    assert details["target"] == target and details["ran_on_device"] is False and details["verified"] is True
    assert "Not run on the device" in (folder / "README.md").read_text()
    assert {path.name for path in folder.iterdir()} >= {"cuda": CUDA_FILES, "tensorrt": TRT_FILES}[target]


@pytest.mark.parametrize(("target", "name"), [("cuda", "w4"), ("tensorrt", "fp8")])
def test_other_commands_take_the_package(target, name, package, model, tmp_path):
    folder, _ = package(target, name)
    verified = json.loads(run("verify", folder, "--threads", 1, "--json"))
    expected = ["checker", "form", "range", "answers", "decode", *(["genai"] if target == "cuda" else [])]
    assert verified["passed"] and [c["name"] for c in verified["checks"]] == expected
    scored = json.loads(
        run("evaluate", folder, "--reference", model, "--sequences", 2, "--length", 48, "--threads", 1, "--json")
    )
    assert scored["reference"]["kl_nats"] < 0.1
    told = json.loads(run("run", folder, "--prompt", "abc", "--max-new-tokens", 4, "--threads", 1, "--json"))
    assert told["prompt"] == "abc" and 1 <= told["tokens"] <= 4
    gate = [folder, "--baseline", tmp_path / "baseline.json", "--sequences", 8, "--length", 64, "--threads", 1]
    run("check", *gate, "--update-baseline")
    assert json.loads(run("check", *gate, "--json"))["passed"]
    assert target in run("inspect", folder)


@pytest.mark.parametrize(("target", "name"), PACKAGES)
def test_explain_says_whose_graph_it_shows(target, name, package):
    folder, _ = package(target, name)
    module = importlib.import_module("qtool.cli.explain")
    result = CliRunner().invoke(module.command, [str(folder), "--json"], standalone_mode=False)
    assert result.exception is None and json.loads(result.stdout)[0]["linears"]
    assert f"made for target {target}" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("target", "command"), [("cuda", "onnxruntime-genai-cuda"), ("tensorrt", "trtexec $(cat trtexec.txt)")]
)
def test_the_card_holds_commands_that_parse(target, command, package):
    card = (package(target, "w4")[0] / "README.md").read_text()
    assert command in card and "cpu" not in card.split("---")[1]
    for block in card.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")


def test_the_cards_python_opens_the_session_as_written(package, monkeypatch):
    """The same lines with this machine's provider in the file: everything else they read is there."""
    import onnxruntime as ort

    folder, _ = package("tensorrt", "fp8")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    asked = {}
    made = ort.InferenceSession

    def here(path, options, providers):
        asked["providers"] = providers
        return made(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.chdir(folder)
    monkeypatch.setattr(ort, "InferenceSession", here)
    names: dict = {}
    exec(code, names)
    assert [name for name, _ in asked["providers"]] == ["NvTensorRTRTXExecutionProvider"]
    assert {value.name for value in names["session"].get_outputs()} >= {"logits", "present.1.value"}


REFUSED = [
    ("cuda", "w4a8", "INT8 inputs that were scored", "--scheme W4A16 or W8A16"),
    ("cuda", "w8a8", "INT8 inputs that were scored", "--target cpu"),
    ("cuda", "int8", "INT8 inputs that were scored", "--target cpu"),
    ("cuda", "fp8", "no FP8 or FP4 product", "--target tensorrt"),
    ("cuda", "kv", "keeps its cache in floats", "quantize without --kv"),
    ("tensorrt", "w8", "weight-only quantization for INT4 alone", "--scheme W4A16"),
    ("tensorrt", "w4a8", "target tensorrt", "--activation per_tensor"),
    ("tensorrt", "w8a8", "not at run time", "--scheme W8A8 --activation per_tensor"),
    ("tensorrt", "fp8_dynamic", "not at run time", "--scheme FP8_DYNAMIC --activation per_tensor"),
    ("tensorrt", "small_groups", "blocks of 64 and 128, not 32", "--group-size 64"),
    ("tensorrt", "asymmetric", "symmetric weights only", "without --asymmetric"),
    ("tensorrt", "kv", "cache in float16", "quantize without --kv"),
    ("tensorrt", "hadamard", "no online transforms", "--rotate or --smooth"),
]


@pytest.mark.parametrize(("target", "name", "why", "remedy"), REFUSED)
def test_schemes_that_the_target_does_not_compute_are_refused(target, name, why, remedy, checkpoint, tmp_path):
    with pytest.raises(UsageError) as caught:
        run("export", checkpoint(name), "-o", tmp_path / "package", "--target", target, "--threads", 1)
    assert why in caught.value.why and remedy in caught.value.remedy
    assert not (tmp_path / "package").exists()


OPTIONS = [
    (["--target", "cuda", "--context", "64"], "--context", "add --target npu or tensorrt"),
    (["--target", "cuda", "--norm", "rms"], "--norm", "add --target npu"),
    (["--target", "tensorrt", "--activations", "uint8"], "--activations", "add --target npu"),
    (["--target", "tensorrt", "--prefill", "w8a8"], "--prefill", "leave them out"),
    (["--target", "cuda", "--kv", "int8"], "--kv", "leave them out"),
    (["--target", "tensorrt", "--layout", "transformers.js"], "qtool export", "one of --target"),
    (["--target", "cuda", "--format", "compressed-tensors"], "qtool export", "one of --target"),
    (["--target", "tensorrt", "--context", "512"], "context 512", "256 or less"),
]


@pytest.mark.parametrize(("given", "what", "remedy"), OPTIONS)
def test_options_of_other_targets_are_refused(given, what, remedy, checkpoint, tmp_path):
    with pytest.raises(UsageError) as caught:
        run("export", checkpoint("w4"), "-o", tmp_path / "package", *given)
    assert what in caught.value.what and remedy in caught.value.remedy


def test_without_verification_there_is_nothing_to_verify(checkpoint, tmp_path):
    output = tmp_path / "package"
    run("export", checkpoint("w4"), "-o", output, "--target", "tensorrt", "--no-verify", "--threads", 1)
    assert not (output / "verification.json").exists()
    with pytest.raises(InputRefused, match="exported with --no-verify"):
        run("verify", output, "--threads", 1)


def test_a_changed_byte_is_refused(package, tmp_path):
    folder, _ = package("cuda", "w4")
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in folder.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "session.json").write_bytes(b"{}")
    with pytest.raises(InputRefused, match=r"session\.json"):
        run("verify", changed, "--threads", 1)


def test_a_graph_that_computes_something_else_fails_the_gate(checkpoint, tmp_path, monkeypatch):
    """A transposed code order, planted in the writer: weights and logits both tell."""
    from qtool.quantize.export.onnx.tensorrt import linear

    wrong = {**linear._CODES, "INT4": lambda tensor: linear.pack_int4(linear._integers(tensor)[:, ::-1])}
    monkeypatch.setattr(linear, "_CODES", wrong)
    with pytest.raises(GateFailed, match="weights: error"):
        run("export", checkpoint("w4"), "-o", tmp_path / "package", "--target", "tensorrt", "--threads", 1)
    assert not (tmp_path / "package").exists()


def test_numbers_beyond_float16_fail_with_that_reason(write_model, tmp_path):
    """A residual stream that doubles past 65504: every weight fits float16, the sums do not."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = write_model(tmp_path / "model", "llama", intermediate_size=128)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    save_file({**tensors, name: (tensors[name] * 2e5).astype(np.float32)}, folder / "model.safetensors")
    for target in ("cuda", "tensorrt"):
        with pytest.raises(GateFailed, match=r"range: largest .*, limit 6\.55e\+04, largest of the float16 tensors"):
            run("export", folder, "-o", tmp_path / target, "--target", target, "--threads", 1)
        assert not (tmp_path / target).exists()


def test_the_file_stands_alone(package, tmp_path):
    """Moved elsewhere, the graph still finds its data: no absolute locations."""
    folder, _ = package("tensorrt", "w4")
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    located = {
        entry.value
        for tensor in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert located == {"model.onnx.data"}
