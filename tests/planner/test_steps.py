"""Decisions and steps: what is proposed, what is kept, what is rolled back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qtool.errors import GateFailed, InputRefused, QtoolError, UsageError
from qtool.quantize.artifacts.distillation import Distillation
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.planner.budget import Budget
from qtool.quantize.planner.candidates import AS_ASKED, candidates
from qtool.quantize.planner.cost import Cost
from qtool.quantize.planner.decide import Decisions, SiteTrials
from qtool.quantize.planner.steps import Measured, Step, run_steps
from qtool.quantize.planner.trial import Trial

ASKED = Recipe.preset("W4A8", activation="per_token", lm_head="float")
NAMES = {c.name: c for c in candidates(ASKED)}
SITES = [("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"), ("model.layers.10.mlp.down_proj",)]


def site(modules: tuple[str, ...], losses: dict[str, float], bits: dict[str, int]) -> SiteTrials:
    trials = tuple(
        Trial(candidate=n, kl_nats=loss, output_error=loss, cost=Cost(bits=bits[n], reads=bits[n], work=bits[n]))
        for n, loss in losses.items()
    )
    return SiteTrials(modules=modules, parameters=100, trials=trials)


def decisions(budget: Budget) -> Decisions:
    bits = {AS_ASKED: 425, "quad 8": 460, "quad 32": 560}
    losses = [{AS_ASKED: 0.10, "quad 8": 0.02, "quad 32": 0.015}, {AS_ASKED: 0.04, "quad 8": 0.03, "quad 32": 0.005}]
    sites = [site(modules, loss, bits) for modules, loss in zip(SITES, losses, strict=True)]
    return Decisions(ASKED, NAMES, sites, budget)


def measured(kl: float, bits: float = 4.5, increase: float | None = None) -> Measured:
    loss = kl if increase is None else increase
    losses = (2.0 + loss * 0.99, 2.0 + loss, 2.0 + loss * 1.01)
    return Measured(kl_nats=(kl * 0.99, kl, kl * 1.01), losses=losses, float_loss=2.0, bits=bits)


def by_transform(truth: dict[str, float]) -> Callable[[str, Recipe], Measured]:
    """A model whose KL depends on which steps' names contain which words; the first match counts."""

    def measure(name: str, recipe: Recipe) -> Measured:
        return measured(next(kl for word, kl in truth.items() if word in name))

    return measure


def test_weighing_tokens_is_rolled_back_when_counting_them_alike_is_better() -> None:
    budget = Budget(max_bits=5.1)
    asked = ASKED.model_copy(update={"token_weights": "gradient"})
    sites = decisions(budget).sites
    found = Decisions(asked, NAMES, sites, budget)
    for alike, final in ((0.03, "uniform"), (0.06, "gradient")):
        truth = {AS_ASKED: 0.14, "per site": 0.05, "everywhere": 0.06, "whole": 0.09, "alike": alike}
        steps = run_steps(found, asked, budget, by_transform(truth))
        assert steps[-1].name == "all tokens alike"
        assert [s.recipe.token_weights for s in steps if s.kept][-1] == final
    assert "all tokens alike" not in kept(run_steps(decisions(budget), ASKED, budget, by_transform(truth)))


@pytest.mark.parametrize("distilled, helps", [(0.03, True), (0.06, False)])
def test_distillation_is_tried_once_and_last(distilled: float, helps: bool) -> None:
    budget, wanted = Budget(max_bits=5.1), Distillation(epochs=2)
    tried: list[Recipe] = []

    def measure(name: str, recipe: Recipe) -> Measured:
        tried.append(recipe)
        truth = {AS_ASKED: 0.14, "per site": 0.05, "everywhere": 0.06, "whole": 0.09, "distill": distilled}
        return by_transform(truth)(name, recipe)

    steps = run_steps(decisions(budget), ASKED, budget, measure, wanted)
    assert [recipe.distill for recipe in tried] == [None] * (len(tried) - 1) + [wanted]
    assert steps[-1].kept == helps
    best = [step for step in steps if step.kept][-1].recipe
    assert best.distill == (wanted if helps else None)
    assert best.rules == next(step for step in steps if step.name == "per site").recipe.rules


def kept(steps: list[Step]) -> dict[str, bool]:
    return {step.name: step.kept for step in steps}


def test_sites_get_what_predicts_the_least_loss_within_the_bits() -> None:
    found = decisions(Budget(max_bits=5.1))
    choice = found.per_site()
    assert found.bits(choice) <= 5.1
    rules = {r.match: (r.transform, r.rank) for r in found.recipe(choice).rules[1:]}
    assert rules == {SITES[0]: ("quad", 8), SITES[1]: ("quad", 32)}
    assert found.slowdown(choice) == pytest.approx(((460 + 560) / 850,) * 2)


def test_the_slowdown_is_a_limit() -> None:
    found = decisions(Budget(max_slowdown=1.1))
    assert max(found.slowdown(found.per_site())) <= 1.1
    assert max(found.slowdown(found.one_for_all()[1])) <= 1.1


def test_a_budget_below_the_scheme_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="max-bits"):
        decisions(Budget(max_bits=4.0)).per_site()


def test_a_step_that_helps_is_kept_and_one_that_does_not_is_rolled_back() -> None:
    budget = Budget(max_bits=5.1)
    truth = {AS_ASKED: 0.14, "per site": 0.05, "everywhere": 0.06, "rotate": 0.04, "smooth": 0.09}
    steps = run_steps(decisions(budget), ASKED, budget, by_transform(truth))
    wanted = {AS_ASKED: True, "per site": True, "rotate the whole model": True, "smooth the whole model": False}
    assert {name: value for name, value in kept(steps).items() if "everywhere" not in name} == wanted
    assert [value for name, value in kept(steps).items() if "everywhere" in name] == [False]
    assert steps[-1].recipe.model == ("smooth", "fold_norms", "rotate")  # tried on top of what was kept


def test_a_plan_that_predicts_well_and_measures_badly_is_rolled_back_to_the_rule_as_asked() -> None:
    budget = Budget(max_bits=5.1)
    truth = {AS_ASKED: 0.05, "per site": 0.20, "everywhere": 0.2, "rotate": 0.2, "smooth": 0.2}
    steps = run_steps(decisions(budget), ASKED, budget, by_transform(truth))
    assert [step.name for step in steps if step.kept] == [AS_ASKED]
    assert "KL +0.1500" in steps[1].why


def test_within_the_noise_is_not_better() -> None:
    budget = Budget(max_bits=5.1)

    def measure(name: str, recipe: Recipe) -> Measured:
        kl = (0.10, 0.10, 0.10) if name == AS_ASKED else (0.02, 0.15, 0.12)
        return Measured(kl_nats=kl, losses=(2.1, 2.2, 2.3), float_loss=2.0, bits=4.5)

    assert [step.kept for step in run_steps(decisions(budget), ASKED, budget, measure)][1] is False


@pytest.mark.parametrize("refusal", [InputRefused, UsageError])
def test_what_the_model_refuses_is_written_down_and_passed_over(refusal: type[QtoolError]) -> None:
    budget = Budget(max_bits=5.1)

    def measure(name: str, recipe: Recipe) -> Measured:
        if "rotate" in recipe.model:
            raise refusal("rotate", "a gain stands in the way", "leave it out")
        return measured(0.1 if name == AS_ASKED else 0.05)

    steps = run_steps(decisions(budget), ASKED, budget, measure)
    refused = next(step for step in steps if step.name.startswith("rotate"))
    assert refused.measured is None and not refused.kept and "a gain stands in the way" in refused.why


def test_a_loss_that_is_allowed_is_reached_with_fewer_bits() -> None:
    # Predicted 0.14 → 0.06 → 0.05 → …; measured is twice what is predicted.
    def measure(name: str, recipe: Recipe) -> Measured:
        ranks = [r.rank if r.transform == "quad" else 0 for r in recipe.rules[1:]]
        kl = {0: 0.28, 1: 0.12, 2: 0.04}[len(ranks)] - sum(ranks) * 1e-5
        return measured(kl, bits=4.25 + 0.3 * len(ranks), increase=kl)

    budget = Budget(max_loss=0.14)
    steps = run_steps(decisions(budget), ASKED, budget, measure)
    best = [step for step in steps if step.kept][-1]
    assert best.measured is not None and best.measured.perplexity_increase <= 0.14
    assert best.measured.bits < 4.85
    with pytest.raises(GateFailed, match="max-loss"):
        run_steps(decisions(Budget(max_loss=0.001)), ASKED, Budget(max_loss=0.001), measure)


def test_a_rule_as_asked_beyond_the_limits_is_measured_and_never_the_plan() -> None:
    asked = Recipe.preset("W4A8", activation="per_token", lm_head="float", transform="quad", rank=64)
    bits = {AS_ASKED: 675, "hadamard": 460}
    sites = [site(modules, {AS_ASKED: 0.02, "hadamard": 0.05}, bits) for modules in SITES]
    budget = Budget(max_bits=4.9)
    found = Decisions(asked, {c.name: c for c in candidates(asked)}, sites, budget)
    truth = {AS_ASKED: 0.03, "per site": 0.06, "rotate": 0.2, "smooth": 0.2}
    steps = run_steps(found, asked, budget, by_transform(truth))
    assert not steps[0].kept and "--max-bits" in steps[0].why
    final = [step for step in steps if step.kept][-1]
    assert final.name == "per site" and found.bits(final.choice) <= 4.9

    def refused(name: str, recipe: Recipe) -> Measured:
        if name != AS_ASKED:
            raise InputRefused(name, "cannot be", "leave it out")
        return measured(0.03)

    with pytest.raises(InputRefused, match="per site"):
        run_steps(found, asked, budget, refused)


def test_limits_that_nothing_meets_are_refused_before_anything_is_measured() -> None:
    budget = Budget(max_bits=4.0)
    with pytest.raises(UsageError, match="max-bits"):
        run_steps(decisions(budget), ASKED, budget, lambda name, recipe: pytest.fail(f"measured {name}"))


@pytest.mark.parametrize("distilled, helps", [(0.02, True), (0.04, False), (0.05, False)])
def test_within_the_allowed_loss_what_helps_at_equal_bits_is_kept(distilled: float, helps: bool) -> None:
    budget = Budget(max_loss=0.1)
    truth = {AS_ASKED: 0.14, "per site": 0.04, "everywhere": 0.06, "whole": 0.05, "distill": distilled}
    steps = run_steps(decisions(budget), ASKED, budget, by_transform(truth), Distillation(epochs=2))
    assert steps[-1].name == "distill" and steps[-1].kept == helps
