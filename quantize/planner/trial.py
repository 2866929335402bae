"""Candidates tried on one site: what each would cost the model's output, and what it costs to store and to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.shared_inputs import SharedInputs
from qtool.quantize.planner.cost import Cost, cost_of
from qtool.quantize.planner.sensitivity import SiteInput
from qtool.quantize.quantizers.input_range import with_input_scales
from qtool.quantize.quantizers.layers import QuantizedLayer, quantize_linears


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate on one site.

    Attributes:
        candidate: its name.
        kl_nats: what its error alone would move the model's prediction, nats per token (see `sensitivity`).
        output_error: Σ|ŷ − y|² / Σ|y|² over the scoring tokens, all the site's linears together.
        cost: bits and work.
    """

    candidate: str
    kl_nats: float
    output_error: float
    cost: Cost


def try_candidates(
    site: SiteInput, assignments: Mapping[str, Mapping[str, Assignment]], *, seed: int
) -> list[Trial]:
    """Try every candidate with the arithmetic that it would run.

    Args:
        site: inputs, gradients and weights.
        assignments: by candidate and module.
        seed: of random rotations.
    """
    def fitted(use: Callable[[Tensor], None]) -> None:
        for x in site.fitted:
            use(x)

    exact = [{m: linear(x, w) for m, w in site.weights.items()} for x in site.inputs]
    trials: list[Trial] = []
    for name, decided in assignments.items():
        mine = [decided[module] for module in site.modules]
        layers = quantize_linears(mine, site.weights, site.hessian, {}, seed, fitted, output_errors=False)
        layers = with_input_scales(layers, fitted)
        kl, error = _compare(site, exact, layers)
        cost = cost_of({module: layer.tensor for module, layer in layers.items()})
        trials.append(Trial(candidate=name, kl_nats=kl, output_error=error, cost=cost))
    return trials


def _compare(
    site: SiteInput, exact: list[dict[str, Tensor]], layers: Mapping[str, QuantizedLayer]
) -> tuple[float, float]:
    shared = SharedInputs()
    modules = {m: shared.linear(layer.tensor, None) for m, layer in layers.items()}
    squares, tokens, lost, whole = 0.0, 0, 0.0, 0.0
    for batch, x in enumerate(site.inputs):
        moved = torch.zeros(x.shape[:-1], dtype=torch.float64)
        for name, module in modules.items():
            y = exact[batch][name]
            difference = module(x) - y
            moved += (difference * site.gradients[name][batch]).sum(dim=-1)
            lost += float(difference.double().square().sum())
            whole += float(y.double().square().sum())
        squares += float(moved.square().sum())
        tokens += moved.numel()
    return squares / (2 * tokens), lost / whole if whole > 0 else 0.0
