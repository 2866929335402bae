"""From trials to a recipe: what each site gets within a budget, and what one choice for all sites would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log1p

from qtool.errors import UsageError
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.planner.allocation import Limits, Option, allocate
from qtool.quantize.planner.budget import DEFAULT_BITS, Budget
from qtool.quantize.planner.candidates import AS_ASKED, Candidate, changed
from qtool.quantize.planner.cost import NOTHING, Cost
from qtool.quantize.planner.trial import Trial


@dataclass(frozen=True, kw_only=True)
class SiteTrials:
    """One site: its linears, their parameters, and what was tried, the rule as asked first."""

    modules: tuple[str, ...]
    parameters: int
    trials: tuple[Trial, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate's index for every site, and the totals over sites: predicted nats per token, and cost."""

    by_site: tuple[int, ...]
    kl_nats: float
    cost: Cost


class Decisions:
    """What the trials allow within a budget.

    Args:
        asked: the recipe as asked for; its first rule is the one that candidates change.
        candidates: by name.
        sites: in any fixed order.
        budget: limits on all sites together.
    """

    def __init__(
        self, asked: Recipe, candidates: Mapping[str, Candidate], sites: Sequence[SiteTrials], budget: Budget
    ) -> None:
        self._asked, self._candidates, self.sites = asked, candidates, tuple(sites)
        self.parameters = sum(site.parameters for site in sites)
        self.as_asked = self._choice([0] * len(sites))
        given = budget.max_bits
        if given is None and budget.max_loss is None:
            given = DEFAULT_BITS * self.bits(self.as_asked)
        # A limit met to the bit is met: 5.1 × 200 is 1019.999….
        bits = inf if given is None else given * self.parameters + 1e-6
        slowdown = inf if budget.max_slowdown is None else budget.max_slowdown
        start = self.as_asked.cost
        self._limits = Limits(bits=bits, reads=slowdown * start.reads, work=slowdown * start.work)
        self._target = 0.0 if budget.max_loss is None else log1p(budget.max_loss)

    def per_site(self, trust: float = 1.0) -> Choice:
        """The least predicted loss within the limits; with a loss allowed, the first that reaches it.

        Args:
            trust: measured over predicted loss of an earlier choice; the allowed loss is divided by it.

        Raises:
            UsageError: when the cheapest candidates exceed a limit.
        """
        options = [[Option(loss=t.kl_nats, cost=t.cost) for t in site.trials] for site in self.sites]
        return self._choice(allocate(options, replace(self._limits, loss=self._target / trust)))

    def one_for_all(self) -> tuple[str, Choice]:
        """The candidate that predicts the least loss when every site gets it, among those within the limits.

        Raises:
            UsageError: when none is.
        """
        choices = [self._choice([index] * len(self.sites)) for index in range(len(self._names))]
        fitting = [i for i, c in enumerate(choices) if self._limits.exceeded(c.cost) is None]
        if not fitting:
            raise UsageError("--max-bits or --max-slowdown", "is below the scheme as asked", "allow more")
        best = min(fitting, key=lambda i: (choices[i].kl_nats, i))
        return self._names[best], choices[best]

    def beyond(self, choice: Choice) -> str | None:
        """The option behind the first limit that a choice is over; the rule as asked may be, a proposal never is."""
        return self._limits.exceeded(choice.cost)

    def recipe(self, choice: Choice) -> Recipe:
        """The recipe that gives every site its candidate: the rule as asked, and one more rule per candidate in use."""
        first, *others = self._asked.rules
        modules: dict[str, list[str]] = {}
        for site, index in sorted(zip(self.sites, choice.by_site, strict=True), key=lambda pair: _place(pair[0])):
            modules.setdefault(self._names[index], []).extend(site.modules)
        rules = [
            changed(first, names, self._candidates[name].fields)
            for name, names in sorted(modules.items())
            if name != AS_ASKED
        ]
        data = self._asked.to_data()
        data["rules"] = [rule.model_dump(mode="json") for rule in (first, *rules, *others)]
        return Recipe.from_data(data, name="plan")

    def bits(self, choice: Choice) -> float:
        """Bits per weight of the planned linears."""
        return choice.cost.bits / self.parameters

    def slowdown(self, choice: Choice) -> tuple[float, float]:
        """Decode reads and prefill work, relative to the scheme as asked."""
        return choice.cost.reads / self.as_asked.cost.reads, choice.cost.work / self.as_asked.cost.work

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(trial.candidate for trial in self.sites[0].trials)

    def _choice(self, by_site: Sequence[int]) -> Choice:
        chosen = [site.trials[index] for site, index in zip(self.sites, by_site, strict=True)]
        return Choice(
            by_site=tuple(by_site),
            kl_nats=sum(trial.kl_nats for trial in chosen),
            cost=sum((trial.cost for trial in chosen), NOTHING),
        )


def _place(site: SiteTrials) -> list[tuple[int, str]]:
    """Sorts module names with their block numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in site.modules[0].split(".")]
