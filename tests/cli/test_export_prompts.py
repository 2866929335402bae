"""`qtool export --prefill`, `--kv` and `--last-logits` through the commands, to a verified package that runs."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qtool.errors import GateFailed, UsageError
from qtool.quantize.export.onnx.passes import token_int8


def qtool(name: str, *arguments: Any) -> str:
    command = import_module(f"qtool.cli.{name}").command
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Path:
    """W4A8 behind a signed Hadamard rotation of every input but the head's."""
    place = tmp_path_factory.mktemp("prompts")
    options = ("--scheme", "W4A8", "--group-size", 32, "--quantizer", "rtn", "--transform", "hadamard", "--threads", 1)
    qtool("quantize", write_model(place / "model", "llama"), "-o", place / "checkpoint", *options)
    return place / "checkpoint"


def test_a_package_with_everything_is_verified_scored_and_run(checkpoint: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    options = ("--prefill", "w8a8", "--kv", "int8", "--threads", 1)
    written = json.loads(qtool("export", checkpoint, "-o", package, *options, "--json"))
    checks = {check["name"]: check["outcome"] for check in written["verification"]["checks"]}
    names = ("nodes", "online", "model", "decode", "prompt nodes", "prompt online", "prompts", "genai")
    assert set(checks) == set(names) and set(checks.values()) <= {"pass", "skipped"}
    details = json.loads((package / "manifest.json").read_text())["details"]
    assert details["logits"] == "last" and details["kv"] == "int8 per channel"
    assert details["prefill"]["scheme"] == "W8A8 per channel act per_token"
    assert details["prefill"]["data_bytes"] == (package / "fill.onnx.data").stat().st_size
    assert details["calibration_windows"]  # the cache's text counts
    assert 0 < details["kv_error"]["kl_nats"] < 0.01 and written["kv_error"] == details["kv_error"]
    qtool("verify", package, "--threads", 1)
    inspected = qtool("inspect", package)
    assert "cache int8 per channel" in inspected and "prompts: fill.onnx, W8A8 per channel" in inspected
    report = tmp_path / "report.json"
    size = ("--sequences", 1, "--length", 32, "--threads", 1)
    qtool("evaluate", package, "--reference", checkpoint, "-o", report, *size)
    assert np.isfinite(json.loads(report.read_text())["perplexity"])
    assert qtool("run", package, "--prompt", "Once upon a time there was", "--max-new-tokens", 4, "--threads", 1)


def test_a_wrong_int8_weight_is_caught_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = token_int8._PARTS[token_int8.WEIGHT]
    monkeypatch.setitem(token_int8._PARTS, token_int8.WEIGHT, lambda weights: np.roll(right(weights), 1, axis=0))
    with pytest.raises(GateFailed, match="prompt nodes: error"):
        qtool("export", checkpoint, "-o", tmp_path / "package", "--prefill", "w8a8", "--threads", 1)
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--layout", "transformers.js", "--last-logits"), "wants the logits of all"),
        (("--layout", "transformers.js", "--kv", "int8"), "caches of floats"),
        (("--layout", "transformers.js", "--prefill", "w8a8", "--no-verify"), "runs one graph"),
        (("--format", "compressed-tensors", "--prefill", "w8a8"), "--target cpu"),
        (("--target", "npu", "--kv", "int8"), "--target cpu"),
        (("--kv-text", "text.txt"), "add --kv int8"),
    ],
)
def test_what_does_not_go_together_is_refused(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    with pytest.raises(UsageError) as caught:
        qtool("export", checkpoint, "-o", tmp_path / "package", *options)
    assert why in str(caught.value)
    assert not (tmp_path / "package").exists()


def test_a_limit_of_memory(checkpoint: Path, tmp_path: Path) -> None:
    limited = tmp_path / "limited"
    base = ("--prefill", "w8a8", "--threads", 1)
    with pytest.raises(UsageError) as refused:
        qtool("export", checkpoint, "-o", limited, *base, "--prefill-memory", "1KB")
    assert "0.0MB" in str(refused.value) and "allow 1MB" in str(refused.value) and not limited.exists()
    qtool("export", checkpoint, "-o", limited, *base, "--prefill-memory", "40KiB", "--no-verify")
    prefill = json.loads((limited / "manifest.json").read_text())["details"]["prefill"]
    assert 0 < prefill["memory_bytes"] <= 40 * 1024 and 0 < len(prefill["int8"]) < 7
    assert {node["op"] for node in prefill["nodes"].values()} >= {"MatMulNBits", "MatMulIntegerToFloat"}
    inspected = qtool("inspect", limited)
    assert "in memory" in inspected and f"in INT8 there: {', '.join(prefill['int8'])}" in inspected
    assert qtool("run", limited, "--prompt", "Once upon a time there was", "--max-new-tokens", 4, "--threads", 1)


def test_a_package_for_genai_is_verified(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--prefill", "w8a8", "--prefill-for", "genai", "--threads", 1)
    written = json.loads(qtool("export", checkpoint, "-o", tmp_path / "package", *options, "--json"))
    checks = {check["name"]: check["outcome"] for check in written["verification"]["checks"]}
    assert checks["prompts"] == "pass" and checks["genai"] in ("pass", "skipped")
    assert json.loads((tmp_path / "package" / "genai_config.json").read_text())["model"]["type"] == "decoder-pipeline"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--prefill-memory", "1GB"), "add --prefill w8a8"),
        (("--prefill-for", "genai"), "add --prefill w8a8"),
        (("--prefill", "w8a8", "--prefill-memory", "much"), "write 80MB"),
        (("--prefill", "w8a8", "--prefill-for", "genai", "--kv", "int8"), "one cache for both"),
    ],
)
def test_options_of_the_graph_for_prompts_that_do_not_go_together(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    with pytest.raises(UsageError) as caught:
        qtool("export", checkpoint, "-o", tmp_path / "package", *options)
    assert why in str(caught.value)
