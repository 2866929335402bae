"""From float weights to quantized tensors, for the linears that read one input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.rule import Assignment, TransformChoice
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.quantizers.calibration import Inputs
from qtool.quantize.quantizers.frozen_factors import then_smooth
from qtool.quantize.quantizers.hessian import output_error, squared_norm
from qtool.quantize.quantizers.numerics import decode
from qtool.quantize.quantizers.outcome import Outcome
from qtool.quantize.quantizers.report import LayerRecord
from qtool.quantize.quantizers.table import QUANTIZERS
from qtool.quantize.transforms.block_hadamard import BlockHadamard, block_for
from qtool.quantize.transforms.low_rank import LowRank, low_rank
from qtool.quantize.transforms.quad import quad
from qtool.quantize.transforms.site_transform import SiteTransform


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
    seed: int = 0,
    inputs: Inputs | None = None,
    *,
    output_errors: bool = True,
    last_use: bool = False,
) -> dict[str, QuantizedLayer]:
    """Quantize linears that read one input.

    Linears with the same scheme, quantizer and options are stacked and go through the quantizer as one weight: its
    rows are independent, so the codes are the same and the Hessian is factored once. (NVFP4 scales then share their
    factor, which fused kernels ask for.)

    Args:
        assignments: what each linear gets; those that stay in float are passed over.
        weights: [N, K] float32 by module.
        hessian: Σ x xᵀ of the shared input [K, K] float64, or None when no quantizer here needs it.
        input_scales: a scalar by module where activations are static per tensor.
        seed: of random rotations.
        inputs: hands the shared input [b, T, K] to a function, batch by batch; for frozen smoothing.
        output_errors: report them, which takes about as long as GPTQ; trials measure their own.
        last_use: the Hessian may be overwritten.
    """
    site = f"{assignments[0].module}.input"
    alike: dict[object, list[Assignment]] = {}
    for assignment in assignments:
        if assignment.scheme is not None:
            smooth = assignment.frozen_smooth
            key = (assignment.scheme, assignment.quantizer, assignment.options, assignment.transform, smooth)
            alike.setdefault(key, []).append(assignment)
    done: dict[str, QuantizedLayer] = {}
    for number, members in enumerate(alike.values(), start=1):
        first = members[0]
        assert first.scheme is not None
        stacked = torch.cat([weights[m.module] for m in members]) if len(members) > 1 else weights[first.module]
        transform = site_transform(first.transform, stacked.shape[1], hessian, seed=seed, site=site)
        kind = "" if first.transform is None else f"{first.transform}"
        if first.frozen_smooth:
            transform = _smoothed(transform, first.scheme, stacked.shape[1], inputs)
            kind = f"{kind} smooth{group_size_of(first.scheme.weight.granularity)}".lstrip()
        main, side = (stacked, None) if transform is None else transform.weight(stacked)
        moment = hessian
        if transform is not None and hessian is not None:
            moment = transform.second_moment(hessian, inplace=last_use and number == len(alike))
        outcome = QUANTIZERS[first.quantizer].quantize(main, moment, first.scheme.weight, first.options)
        start = 0
        for member in members:
            rows = slice(start, start + len(weights[member.module]))
            part = _Part(
                outcome=outcome.rows(rows.start, rows.stop),
                weight=main[rows],
                side=None if side is None else side[rows].to(torch.float16).to(torch.float32),
                hessian=moment,
                output_error=output_errors,
                transform=transform,
                site=f"{site}.{kind}".replace(" ", "_") if transform is not None else "",
            )
            done[member.module] = _layer(member, first.scheme, part, input_scales)
            start = rows.stop
    return done


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One linear's rows of what its group shares: the weight's main part [N, K'], its side part, MᵀHM.

    `output_error` asks for it in the report.
    """

    outcome: Outcome
    weight: Tensor
    side: Tensor | None
    hessian: Tensor | None
    output_error: bool
    transform: SiteTransform | None
    site: str


def site_transform(
    choice: TransformChoice | None, width: int, hessian: Tensor | None, *, seed: int, site: str
) -> SiteTransform | None:
    """The transform that a recipe chose for an input of this width, from its second moment where it needs one.

    Raises:
        UsageError: "quad" without calibration.
        InputRefused: a width or rank that cannot be.
    """
    if choice is None:
        return None
    block = block_for(width, choice.widest_block)
    if choice.kind == "hadamard":
        return BlockHadamard.random(width, seed=seed, stream=site, block=block)
    if hessian is None:
        raise UsageError("transform quad", "needs calibration tokens", "give a text")
    return quad(hessian, choice.rank, seed=seed, stream=site, block=block)


def _smoothed(
    transform: SiteTransform | None, scheme: LayerScheme, width: int, inputs: Inputs | None
) -> SiteTransform:
    group = group_size_of(scheme.weight.granularity)
    if inputs is None or group is None:
        raise UsageError("runtime_smooth: frozen", "needs calibration tokens", "give a text")
    return then_smooth(transform, width if transform is None else transform.main_width, group, inputs)


def _correction(assignment: Assignment, difference: Tensor, hessian: Tensor | None) -> LowRank | None:
    """The low-rank correction of Ŵ − W, its factors rounded to the 16 bits they are stored in."""
    if not assignment.low_rank:
        return None
    factors = low_rank(-difference, min(assignment.low_rank, *difference.shape), hessian)
    return LowRank(up=factors.up.half().float(), down=factors.down.half().float())


def _layer(
    assignment: Assignment, scheme: LayerScheme, part: _Part, input_scales: Mapping[str, Tensor]
) -> QuantizedLayer:
    outcome, weight, hessian = part.outcome, part.weight, part.hessian
    difference = decode(outcome.codes, outcome.grid, scheme.weight) - weight
    correction = _correction(assignment, difference, hessian)
    if correction is not None:
        difference = difference + correction.weight
    power = squared_norm(weight)
    record = LayerRecord(
        quantizer=assignment.quantizer,
        weight_error=squared_norm(difference) / power if power > 0 else 0.0,
        output_error=output_error(difference, weight, hessian) if part.output_error and hessian is not None else None,
        damp=outcome.damp,
        escalations=outcome.escalations,
    )
    tensor = QuantizedTensor(
        codes=outcome.codes,
        scale=outcome.grid.scale,
        scale_factor=outcome.grid.factor,
        zero_point=outcome.grid.zero_point,
        input_scale=input_scales.get(assignment.module),
        scheme=scheme,
        transform=part.transform,
        site=part.site,
        side=part.side,
        low_rank=correction,
    )
    return QuantizedLayer(tensor=tensor, record=record)


def static_input_scales(assignments: Mapping[str, Assignment], statistics: Statistics | None) -> dict[str, Tensor]:
    """The input scale, amax / qmax, of every linear whose activations are static per tensor, where statistics are given
    and speak of what its quantizer sees: the input itself, not a transform of it. Calibration finds the others.

    Raises:
        UsageError: when statistics lack a linear's input.
    """
    scales: dict[str, Tensor] = {}
    for module, assignment in assignments.items():
        scheme = None if assignment.scheme is None else assignment.scheme.input
        if statistics is None or scheme is None or scheme.dynamic or assignment.transform is not None:
            continue
        site = statistics.find(f"{module}.input")
        if site is None:
            raise UsageError(
                f"{module}: per_tensor activations", "need measured ranges", "measure this model, or give no statistics"
            )
        amax = torch.tensor(site.amax, dtype=torch.float32)
        scales[module] = amax / scheme.format.qmax if site.amax > 0 else torch.ones(())
    return scales
