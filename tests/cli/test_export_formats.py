"""One checkpoint's codes through the commands: compressed-tensors and back, transformers.js, and their model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from qtool.errors import GateFailed, UsageError


def qtool(name: str, *arguments: Any) -> str:
    from importlib import import_module

    command = import_module(f"qtool.cli.{name}").command
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> tuple[Path, Path]:
    """A tiny model and its checkpoint, W4A16 with a head in float."""
    place = tmp_path_factory.mktemp("formats")
    model = write_model(place / "model", "llama", tied=False)
    options = ("--scheme", "W4A16", "--group-size", 32, "--quantizer", "rtn", "--ignore", "lm_head", "--json")
    qtool("quantize", model, "-o", place / "checkpoint", *options)
    return model, place / "checkpoint"


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_compressed_tensors_there_and_back(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, checkpoint = made
    written = json.loads(
        qtool("export", checkpoint, "-o", tmp_path / "hf", "--format", "compressed-tensors", "--json",
              "--base-model", "owner/name")
    )  # fmt: skip
    assert written["verification"]["passed"]
    head, body = card(tmp_path / "hf")
    assert head["library_name"] == "transformers" and head["base_model"] == "owner/name"
    assert "| linears in W4A16 g32 | 14 |" in body and "14 linears: codes, scales and zero points equal" in body
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    assert manifest["kind"] == "compressed-tensors" and "README.md" in manifest["files"]
    assert written["digest"][:16] in qtool("verify", tmp_path / "hf")
    assert "pack-quantized" in qtool("inspect", tmp_path / "hf")
    qtool("import_checkpoint", tmp_path / "hf", "-o", tmp_path / "back")
    ours, theirs = all_tensors(checkpoint), all_tensors(tmp_path / "back")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    tokens = torch.arange(5, 17)[None]
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (checkpoint, tmp_path / "back")
    )
    assert torch.equal(first, second)


def test_folder_that_is_not_what_the_checkpoint_holds_is_never_written(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.quantize.export.hf import folder as room

    honest = room.compressed_tensors

    def one_code_off(module: str, weight: Any) -> dict[str, Any]:
        tensors = honest(module, weight)
        if module.endswith("1.mlp.up_proj"):
            tensors[f"{module}.weight_packed"][3, 2] ^= 1
        return tensors

    monkeypatch.setattr(room, "compressed_tensors", one_code_off)
    with pytest.raises(GateFailed, match=r"model\.layers\.1\.mlp\.up_proj differs"):
        qtool("export", made[1], "-o", tmp_path / "hf", "--format", "compressed-tensors")
    assert not (tmp_path / "hf").exists()


def test_transformers_js_is_verified_as_it_ships(made: tuple[Path, Path], tmp_path: Path) -> None:
    qtool("export", made[1], "-o", tmp_path / "js", "--layout", "transformers.js", "--threads", 1)
    head, body = card(tmp_path / "js")
    assert head["library_name"] == "transformers.js" and 'dtype: "q4"' in body and "| nodes | pass |" in body
    checks = json.loads((tmp_path / "js" / "verification.json").read_text())["checks"]
    assert {c["name"]: c["outcome"] for c in checks} == {
        "nodes": "pass", "model": "pass", "decode": "pass", "genai": "skipped"
    }  # fmt: skip
    assert (tmp_path / "js" / "onnx" / "model_q4.onnx_data").is_file()
    assert json.loads(qtool("verify", tmp_path / "js", "--threads", 1, "--json"))["passed"]


def test_cards_take_evaluations_of_the_checkpoint_only(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, checkpoint = made
    report = tmp_path / "report.json"
    options = ("--sequences", 1, "--length", 32, "--threads", 1)
    qtool("evaluate", checkpoint, "--reference", model, "-o", report, *options)
    found = json.loads(report.read_text())
    where = ("--format", "compressed-tensors", "--evaluation", report)
    qtool("export", checkpoint, "-o", tmp_path / "hf", *where)
    body = card(tmp_path / "hf")[1]
    assert f"{found['perplexity']:.4f}" in body and f"{found['reference']['kl_nats']:.5f}" in body
    report.write_text(json.dumps({**found, "subject_digest": "0" * 64}))
    with pytest.raises(UsageError, match="scored something else"):
        qtool("export", checkpoint, "-o", tmp_path / "other", *where)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--format", "compressed-tensors", "--layout", "transformers.js"), "one kind of folder at a time"),
        (("--base-model", "not an id"), "is no id on the Hub"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: tuple[str, ...], words: str, made: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        qtool("export", made[1], "-o", tmp_path / "out", *arguments)


def test_a_float_model_is_in_that_format_already(made: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not quantized"):
        qtool("export", made[0], "-o", tmp_path / "out", "--format", "compressed-tensors")
