"""From float weights to quantized tensors, for the linears that read one input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.quantize.artifacts.checkpoint import QuantizedTensor
from qtool.quantize.artifacts.recipe import Assignment
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.quantizers.hessian import output_error
from qtool.quantize.quantizers.numerics import decode
from qtool.quantize.quantizers.outcome import Outcome
from qtool.quantize.quantizers.report import LayerRecord
from qtool.quantize.quantizers.table import QUANTIZERS


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """One linear, done: what is stored and what is reported."""

    tensor: QuantizedTensor
    record: LayerRecord


def quantize_linears(
    assignments: Sequence[Assignment],
    weights: Mapping[str, Tensor],
    hessian: Tensor | None,
    input_scales: Mapping[str, Tensor],
) -> dict[str, QuantizedLayer]:
    """Quantize linears that read one input.

    Linears with the same scheme, quantizer and options are stacked and go through the quantizer as one weight: its
    rows are independent, so the codes are the same and the Hessian is factored once.

    Args:
        assignments: what each linear gets; those that stay in float are passed over.
        weights: [N, K] float32 by module.
        hessian: Σ x xᵀ of the shared input [K, K] float64, or None when no quantizer here needs it.
        input_scales: a scalar by module where activations are static per tensor.
    """
    alike: dict[object, list[Assignment]] = {}
    for assignment in assignments:
        if assignment.scheme is not None:
            alike.setdefault((assignment.scheme, assignment.quantizer, assignment.options), []).append(assignment)
    done: dict[str, QuantizedLayer] = {}
    for members in alike.values():
        first = members[0]
        assert first.scheme is not None
        stacked = torch.cat([weights[m.module] for m in members])
        outcome = QUANTIZERS[first.quantizer].quantize(stacked, hessian, first.scheme.weight, first.options)
        start = 0
        for member in members:
            stop = start + len(weights[member.module])
            own = outcome.rows(start, stop)
            done[member.module] = _layer(member, first.scheme, own, weights[member.module], hessian, input_scales)
            start = stop
    return done


def _layer(
    assignment: Assignment,
    scheme: LayerScheme,
    outcome: Outcome,
    weight: Tensor,
    hessian: Tensor | None,
    input_scales: Mapping[str, Tensor],
) -> QuantizedLayer:
    difference = decode(outcome.codes, outcome.grid, scheme.weight) - weight
    power = float(weight.double().square().sum())
    record = LayerRecord(
        quantizer=assignment.quantizer,
        weight_error=float(difference.double().square().sum()) / power if power > 0 else 0.0,
        output_error=None if hessian is None else output_error(difference, weight, hessian),
        damp=outcome.damp,
        escalations=outcome.escalations,
    )
    tensor = QuantizedTensor(
        codes=outcome.codes,
        scale=outcome.grid.scale,
        zero_point=outcome.grid.zero_point,
        input_scale=input_scales.get(assignment.module),
        scheme=scheme,
    )
    return QuantizedLayer(tensor=tensor, record=record)


def static_input_scales(assignments: Mapping[str, Assignment], statistics: Statistics | None) -> dict[str, Tensor]:
    """The stored input scale, amax / qmax, of every linear whose activations are static per tensor.

    Raises:
        UsageError: when statistics are missing, or lack a linear's input.
    """
    scales: dict[str, Tensor] = {}
    for module, assignment in assignments.items():
        scheme = None if assignment.scheme is None else assignment.scheme.input
        if scheme is None or scheme.dynamic:
            continue
        site = None if statistics is None else statistics.find(f"{module}.input")
        if site is None:
            raise UsageError(
                f"{module}: per_tensor activations", "need measured ranges", "run qtool measure and pass --statistics"
            )
        amax = torch.tensor(site.amax, dtype=torch.float32)
        scales[module] = amax / scheme.format.qmax if site.amax > 0 else torch.ones(())
    return scales
