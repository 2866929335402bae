"""`qtool plan` and `qtool quantize --auto` on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.cli.main import main
from qtool.quantize.quantizers.run_journal import RunJournal

Make = Callable[..., Path]
SCHEME = ("--scheme", "W4A4", "--group-size", "32", "--lm-head", "float", "--threads", "1")
TEXT = ("--sequences", "8", "--length", "32")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


Run = Callable[..., tuple[int, str, str]]


save = RunJournal.save


def stopped_after_saving(journal: RunJournal, *shard: Any) -> None:
    save(journal, *shard)
    raise KeyboardInterrupt


def test_a_plan_is_an_artifact_whose_recipe_repeats_it(
    run: Run, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    budget = ("--max-bits", "6.5", "--max-slowdown", "3")
    code, printed, _ = run("plan", model, "-o", tmp_path / "plan", *SCHEME, *TEXT, *budget, "--json")
    assert code == 0
    answer = json.loads(printed)
    kept = [step for step in answer["steps"] if step["kept"]]
    assert kept[0]["name"] == "as asked" and kept[-1]["kl_nats"] <= kept[0]["kl_nats"]
    assert yaml.safe_load((tmp_path / "plan" / "recipe.yaml").read_text()) == answer["recipe"]
    code, shown, _ = run("inspect", tmp_path / "plan")
    assert code == 0 and "as asked" in shown and "what sites got" in shown
    for name in ("first", "second"):
        given = ("--recipe", tmp_path / "plan" / "recipe.yaml", "--threads", "1")
        assert run("quantize", model, "-o", tmp_path / name, *given, *TEXT)[0] == 0
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in ("first", "second"))
    assert first == second
    auto = ("quantize", model, "-o", tmp_path / "auto", *SCHEME, *TEXT, *budget, "--auto")
    with monkeypatch.context() as patch:
        patch.setattr(RunJournal, "save", stopped_after_saving)
        assert run(*auto)[0] == 130
    code, printed, err = run(*auto)
    assert code == 0
    assert "continuing after shard 1" in err
    assert "as asked" in printed and "kept" in printed
    manifest = json.loads((tmp_path / "auto" / "manifest.json").read_text())
    assert manifest["recipe"] == answer["recipe"]
    same = json.loads(first)["files"]
    assert {n: f for n, f in manifest["files"].items() if n.startswith("tensors")} == {
        n: f for n, f in same.items() if n.startswith("tensors")
    }
    assert json.loads((tmp_path / "auto" / "plan.json").read_text())["recipe"] == answer["recipe"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("quantize", "-o", "out", *SCHEME, "--max-bits", "5"), "--auto"),
        (("plan", *SCHEME), "--output"),
        (("plan", *SCHEME, "--dry-run", "--max-bits", "5"), "--max-bits"),
        (("plan", *SCHEME, "--dry-run", "--mixed"), "--mixed"),
        (("plan", "-o", "out", *SCHEME, *TEXT, "--rank", "16"), "--rank"),
        (("plan", "-o", "out", *SCHEME, *TEXT, "--activation-clip", "0"), "activation_clip"),
        (("plan", "-o", "out", *SCHEME, *TEXT, "--ignore", "*", "--kv", "int4"), "nothing to plan"),
        (("quantize", "-o", "out", "--recipe", "out.yaml", "--seed", "0"), "--seed"),
        (("plan", "-o", "out", *SCHEME, *TEXT, "--max-bits", "3"), "--max-bits"),
        (("plan", "-o", "out", *SCHEME, "--sequences", "3", "--length", "32"), "--sequences"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    run: Run, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str
) -> None:
    model = tiny_model("llama")
    monkeypatch.chdir(tmp_path)
    found, _, err = run(arguments[0], model, *arguments[1:])
    assert found == 2
    assert named in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
