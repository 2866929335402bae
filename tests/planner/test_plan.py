"""A whole plan on a tiny model whose inputs have planted outliers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.cli import planning
from qtool.cli.planning import Planner
from qtool.cli.quantize import recipe_of
from qtool.errors import UsageError
from qtool.quantize.artifacts.distillation import Distillation
from qtool.quantize.artifacts.plan import Plan
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.store import open_artifact, stage
from qtool.quantize.inputs import Tokens, open_model
from qtool.quantize.planner.budget import Budget
from qtool.quantize.planner.plan import split

Make = Callable[..., Path]
TOKENS = Tokens(
    ids=np.random.default_rng(0).integers(0, 256, (12, 32)), text_sha256="0" * 64, tokenizer_sha256="1" * 64, windows=()
)
ASKED = Recipe.preset("W4A4", lm_head="float", group_size=32)


def planned(folder: Path, budget: Budget, asked: Recipe = ASKED) -> Plan:
    return Planner(open_model(str(folder)), asked, TOKENS, mixed=False, threads=1).plan(budget)


def test_the_plan_beats_the_scheme_as_asked_and_says_why(tiny_model: Make, tmp_path: Path) -> None:
    budget = Budget(max_bits=6.5, max_slowdown=60.0)
    plan = planned(tiny_model("llama"), budget)
    start, final = plan.steps[0], plan.final
    assert final.kl_nats is not None and start.kl_nats is not None and final.bits is not None
    assert final.kl_nats < 0.9 * start.kl_nats
    assert final.bits <= 6.5 and 3.0 < max(final.decode, final.prefill) <= 60.0
    assert plan.recipe == next(r for r in [plan.recipe] if r.assign(_linears(plan)))
    chosen = {site.modules[0]: site.chosen for site in plan.sites}
    assert len(chosen) == 2 * 4 and any("quad" in name for name in chosen.values())
    for site in plan.sites:
        assert {t.candidate for t in site.trials} >= {"as asked", "hadamard", "quad 8"}
    with stage(tmp_path / "plan") as staging:
        plan.commit(staging)
    assert open_artifact(tmp_path / "plan", kind="plan").details["final"]["kl_nats"] == final.kl_nats
    stored = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert Recipe.from_data(stored["recipe"]) == plan.recipe


def test_online_operations_are_dear_where_linears_are_small(tiny_model: Make) -> None:
    """Of 64 × 64 weights, one operation takes longer than the linear itself: at most three times slower allows few."""
    plan = planned(tiny_model("llama"), Budget(max_bits=6.5, max_slowdown=3.0))
    online = [site for site in plan.sites if "quad" in site.chosen or "hadamard" in site.chosen]
    assert len(online) <= 1
    assert max(plan.final.decode, plan.final.prefill) <= 3.0
    reads = {trial.candidate: trial.reads for trial in plan.sites[0].trials}
    assert reads["quad 8"] > 2 * reads["hadamard"] > 8 * reads["as asked"]


def _linears(plan: Plan) -> list[str]:
    return [module for site in plan.sites for module in site.modules] + ["lm_head"]


def test_the_same_inputs_give_the_same_plan(tiny_model: Make) -> None:
    folder = tiny_model("qwen3")
    budget = Budget(max_bits=5.5)
    assert planned(folder, budget).to_json() == planned(folder, budget).to_json()


def test_distillation_learns_from_all_text_that_is_not_judged(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (24, 16))
    tokens = dataclasses.replace(TOKENS, ids=ids)
    quantized, seen = planning.quantized, []

    def recorded(source: Any, recipe: Recipe, text: Tokens, *args: Any, **kwargs: Any) -> Any:
        seen.append((recipe.distill is not None, text.ids))
        return quantized(source, recipe, text, *args, **kwargs)

    monkeypatch.setattr(planning, "quantized", recorded)
    asked = ASKED.model_copy(update={"distill": Distillation(epochs=1)})
    plan = Planner(open_model(str(tiny_model("llama"))), asked, tokens, mixed=False, threads=1).plan(Budget())
    assert plan.steps[-1].name == "distill"
    assert [distilled for distilled, _ in seen] == [False] * (len(seen) - 1) + [True]
    fitted, judged = split(ids)
    assert all(np.array_equal(text, fitted) for _, text in seen[:-1])
    assert np.array_equal(np.concatenate([seen[-1][1], judged]), ids) and len(seen[-1][1]) > len(fitted)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_candidates_are_tried_on_the_model_and_with_the_tokens_that_are_quantized(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, quantizer: str
) -> None:
    source, tried = open_model(str(tiny_model("llama", num_hidden_layers=1))), []

    def recorded(model: Any, *args: Any, token_weights: Any, **kwargs: Any) -> list[Any]:
        tried.append((model.digest, token_weights))
        return []

    monkeypatch.setattr("qtool.quantize.planner.plan.try_sites", recorded)
    given = {"lm_head": "float", "group_size": 32, "quantizer": quantizer, "token_weights": "gradient"}
    for model in ([], ["fold_norms", "rotate"]):
        Planner(source, Recipe.preset("W4A4", model=model, **given), TOKENS, mixed=False, threads=1)
    (plain, plain_weights), (rotated, rotated_weights) = tried
    assert plain == source.digest != rotated
    assert plain_weights is not None and rotated_weights is not None


@pytest.mark.parametrize("said, weights", [("", "gradient"), ("token_weights: uniform\n", "uniform")])
def test_a_plan_from_a_recipe_weighs_tokens_unless_it_says_otherwise(tmp_path: Path, said: str, weights: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{said}rules:\n- match: '*'\n  scheme: W4A8\n")
    assert recipe_of(path, {}, planned=True).token_weights == weights
    assert recipe_of(path, {}, planned=False).token_weights == "uniform"


def test_what_is_fitted_is_never_judged() -> None:
    fitted, judged = split(np.arange(40)[:, None])
    assert len(fitted) == 16 and len(judged) == 8 and not set(fitted[:, 0]) & set(judged[:, 0])
    fitted, judged = split(np.arange(4)[:, None])
    assert (len(fitted), len(judged)) == (2, 2)
    with pytest.raises(UsageError, match="--sequences"):
        split(np.arange(3)[:, None])
