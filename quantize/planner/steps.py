"""Steps on the whole model: each is measured, and kept only if the model is better with it.

What trials predict site by site is one site's error alone, behind a float model. A step is therefore a whole recipe:
quantized, run, and compared with the best so far on text that nothing was fitted to (see `HeldOutScores.against`). It
is kept when it is better by more than the noise; otherwise it is rolled back and the next step starts from where this
one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import expm1, log

from qtool.errors import GateFailed, InputRefused, UsageError
from qtool.quantize.artifacts.distillation import Distillation
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.planner.budget import Budget
from qtool.quantize.planner.decide import Choice, Decisions
from qtool.quantize.quantizers.held_out import HeldOutScores

ROUNDS = 3
WHOLE_MODEL = {"rotate": ("fold_norms", "rotate"), "smooth": ("smooth",)}


@dataclass(frozen=True, kw_only=True)
class Measured(HeldOutScores):
    """A quantized model on the planner's held-out text.

    Attributes:
        float_loss: mean cross entropy of the float model, nats per token.
        bits: stored bits per weight of the quantized linears, as reported.
    """

    float_loss: float
    bits: float

    @property
    def perplexity_increase(self) -> float:
        """As a share of the float model's."""
        return expm1(self.mean_loss - self.float_loss)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step and what became of it.

    Attributes:
        name: what was changed.
        choice: each site's candidate, with what the trials predict and count.
        measured: None when the model refuses the step.
        kept: whether the next step starts from it.
        why: in words.
    """

    name: str
    recipe: Recipe
    choice: Choice
    measured: Measured | None
    kept: bool
    why: str


Measure = Callable[[str, Recipe], Measured]


def run_steps(
    decisions: Decisions, asked: Recipe, budget: Budget, measure: Measure, distill: Distillation | None = None
) -> list[Step]:
    """All steps, in order; the last one kept is the plan.

    Args:
        decisions: what the trials allow.
        asked: the recipe as asked for, without distillation.
        budget: its `max_loss` decides when the plan may stop spending.
        measure: quantizes with a recipe and scores it; called with the step's name.
        distill: as asked for. It takes longer than all else, so it is tried once, on what the other steps came to.

    Raises:
        GateFailed: when no step stays within `max_loss`.
        UsageError: when the limits exclude the scheme itself.
    """
    steps: list[Step] = []
    for name, choice, recipe in _proposals(decisions, asked, budget, steps, distill):
        measured, kept, why = None, False, ""
        try:
            measured = measure(name, recipe)
            kept, why = _verdict(measured, _best(steps), budget)
            if (limit := decisions.beyond(choice)) is not None:
                kept, why = False, f"beyond {limit}: measured to compare with"
        except (InputRefused, UsageError) as refusal:
            if _best(steps) is None:
                raise
            why = f"refused: {refusal}"
        steps.append(Step(name=name, recipe=recipe, choice=choice, measured=measured, kept=kept, why=why))
    final = _best(steps)
    assert final is not None and final.measured is not None
    lost = final.measured.perplexity_increase
    if budget.max_loss is not None and lost > budget.max_loss:
        why = f"is not reached: the best plan loses {lost:.4f} at {final.measured.bits:.2f} bits"
        raise GateFailed(f"--max-loss {budget.max_loss:g}", why, "allow more loss, bits or slowdown, or give --mixed")
    return steps


def _best(steps: list[Step]) -> Step | None:
    return next((step for step in reversed(steps) if step.kept), None)


def _proposals(
    decisions: Decisions, asked: Recipe, budget: Budget, steps: list[Step], distill: Distillation | None
) -> Iterator[tuple[str, Choice, Recipe]]:
    """The steps to try, each made when the ones before it are known."""
    choice = decisions.per_site()  # refuses limits that cannot be met before anything is measured
    yield "as asked", decisions.as_asked, asked
    tried = {decisions.as_asked.by_site}
    for attempt in range(ROUNDS):
        if choice.by_site in tried:
            break
        tried.add(choice.by_site)
        yield "per site" if attempt == 0 else f"per site, again ({attempt + 1})", choice, decisions.recipe(choice)
        measured = steps[-1].measured
        if budget.max_loss is None or measured is None or choice.kl_nats <= 0:
            break
        choice = decisions.per_site(trust=max(log(1 + measured.perplexity_increase), 1e-6) / choice.kl_nats)
    name, uniform = decisions.one_for_all()
    if uniform.by_site not in tried:
        yield f"{name} everywhere", uniform, decisions.recipe(uniform)
    for name, transforms in WHOLE_MODEL.items():
        best = _best(steps)
        assert best is not None
        if name not in best.recipe.model:
            data = best.recipe.to_data()
            recipe = Recipe.from_data({**data, "model": [*transforms, *best.recipe.model]}, name="plan")
            yield f"{name} the whole model", best.choice, recipe
    best = _best(steps)
    assert best is not None
    if best.recipe.token_weights != "uniform":
        recipe = best.recipe.model_copy(update={"token_weights": "uniform"})
        yield "all tokens alike", best.choice, recipe
    if distill is not None:
        best = _best(steps)
        assert best is not None
        yield "distill", best.choice, best.recipe.model_copy(update={"distill": distill})


def _verdict(measured: Measured, best: Step | None, budget: Budget) -> tuple[bool, str]:
    if best is None or best.measured is None:
        return True, "the start"
    before = best.measured
    change = measured.against(before)
    if budget.max_loss is not None:
        was, now = (m.perplexity_increase <= budget.max_loss for m in (before, measured))
        if now and was:
            kept = measured.bits < before.bits or (measured.bits == before.bits and change.proven)
            return kept, f"{change}; within the allowed loss at {measured.bits:.3f} bits"
        if now != was:
            return now, f"{change}; {'now within' if now else 'beyond'} the allowed loss"
    return change.proven, str(change)
