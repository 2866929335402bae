"""What `qtool export` says of online transforms when it has written a package."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result


def qtool(name: str, *arguments: Any) -> Result:
    command = import_module(f"qtool.cli.{name}").command
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def checkpoint(tmp_path: Path, write_model: Any) -> Any:
    def make(*options: Any) -> Path:
        scheme = ("--scheme", "W4A8", "--group-size", 32, "--quantizer", "rtn", "--threads", 1)
        qtool("quantize", write_model(tmp_path / "model", "llama"), "-o", tmp_path / "checkpoint", *scheme, *options)
        return tmp_path / "checkpoint"

    return make


@pytest.mark.parametrize("prefill", [(), ("--prefill", "w8a8")], ids=["one graph", "two graphs"])
def test_their_share_of_a_decode_step_is_told_as_explain_tells_it(
    prefill: tuple[str, ...], checkpoint: Any, tmp_path: Path
) -> None:
    source, package = checkpoint("--transform", "hadamard"), tmp_path / "package"
    done = qtool("export", source, "-o", package, "--no-verify", *prefill)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("online transforms: ")]
    assert " of a decode step, " in line
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]
    assert "more than 5 %" in warning
    length = json.loads((package / "config.json").read_text())["max_position_embeddings"] - 1
    again = qtool("explain", package / "model.onnx", "--length", min(512, length))
    assert line in again.stdout.splitlines()
    assert warning in again.stderr.splitlines()
    as_json = qtool("export", source, "-o", tmp_path / "again", "--no-verify", *prefill, "--json")
    told = json.loads(as_json.stdout)["online_transforms"]
    assert f"online transforms: {told['nodes']} nodes, {100 * told['decode_share']:.1f} %" in line
    assert told["decode_share"] > 0.05


def test_a_package_without_them_says_nothing(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint()
    done = qtool("export", source, "-o", tmp_path / "package", "--no-verify")
    assert "online transforms" not in done.output
    as_json = qtool("export", source, "-o", tmp_path / "again", "--no-verify", "--json")
    assert "online_transforms" not in json.loads(as_json.stdout)
