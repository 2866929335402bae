"""The plan: what was tried for every site, which steps the whole model took, and the recipe that came of it.

An artifact folder (docs/formats.md §plan): plan.json, and recipe.yaml, which `qtool quantize --recipe` repeats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.store import Staging, write_file

PLAN, RECIPE = "plan.json", "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One candidate on one site: predicted KL in nats per token, relative squared output error, bits per weight, cost.

    `reads` is bits read for a decoded token, online operations counted as what could be read in their time; `work` is
    multiply-accumulates per token of prefill, in units of an 8-bit one.
    """

    candidate: str
    kl_nats: float
    output_error: float
    bits: float
    reads: int
    work: int


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One site: the linears that read it, the candidate it got, and all that were tried."""

    modules: tuple[str, ...]
    chosen: str
    trials: tuple[TrialRow, ...]


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One step on the whole model, measured on text that nothing was fitted to; None where the model refused it.

    Attributes:
        predicted_kl_nats: the sum of the sites' predictions.
        kl_nats: measured, mean over tokens.
        perplexity_increase: measured, as a share of the float model's.
        bits: stored bits per weight of the quantized linears.
        decode, prefill: reads and work relative to the scheme as asked.
        kept, why: the decision.
    """

    name: str
    predicted_kl_nats: float
    kl_nats: float | None
    perplexity_increase: float | None
    bits: float | None
    decode: float
    prefill: float
    kept: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A finished plan.

    Attributes:
        asked: the recipe as asked for.
        recipe: what to quantize with.
        budget: limits by name, None for none.
        sequences: calibration and held-out sequences and their length.
        sites: in the model's order.
        steps: in the order they were taken.
        parents: model and text.
    """

    asked: Recipe
    recipe: Recipe
    budget: Mapping[str, float | None]
    sequences: Mapping[str, int]
    sites: Sequence[SiteRow]
    steps: Sequence[StepRow]
    parents: tuple[Parent, ...]

    @property
    def final(self) -> StepRow:
        """The last step that was kept: the recipe's own."""
        return next(step for step in reversed(self.steps) if step.kept)

    def to_json(self) -> dict[str, Any]:
        """Plain data, stable."""
        return {
            "asked": self.asked.to_data(),
            "recipe": self.recipe.to_data(),
            "budget": dict(self.budget),
            "sequences": dict(self.sequences),
            "sites": [asdict(site) for site in self.sites],
            "steps": [asdict(step) for step in self.steps],
        }

    def write(self, folder: Path) -> None:
        """plan.json into a folder."""
        write_file(folder / PLAN, (json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n").encode())

    def commit(self, staging: Staging) -> Manifest:
        """Make a staged folder the plan artifact."""
        self.write(staging.path)
        write_file(staging.path / RECIPE, yaml.safe_dump(self.recipe.to_data(), sort_keys=False).encode())
        return staging.commit(
            Manifest(
                kind="plan",
                seed=self.recipe.seed,
                recipe=self.recipe.to_data(),
                parents=self.parents,
                details={"final": asdict(self.final), "budget": dict(self.budget)},
            )
        )
