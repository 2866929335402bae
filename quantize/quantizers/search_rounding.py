"""What a recipe's quantizers do to one linear's weight and input, for a search that tries scales: round to nearest.

GPTQ itself would be run hundreds of times. Where a linear's input is rotated online, both sides are rotated here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qtool.errors import UsageError
from qtool.quantize.artifacts.quantized_linear import InputQuantizer
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.quantizers.input_range import InputRange
from qtool.quantize.quantizers.layers import site_transform
from qtool.quantize.quantizers.numerics import choose_grid, decode, encode
from qtool.quantize.transforms.measured_smoothing import Quantizers, Rounding
from qtool.quantize.transforms.smoothing_loss import Quantize


def search_rounding(assignments: Mapping[str, Assignment], seed: int) -> Quantizers:
    """The quantizers of every linear, for `smooth_searched`.

    Args:
        assignments: by module.
        seed: of random rotations.

    Raises:
        UsageError: a linear with the transform "quad", whose directions would change with every scale tried.
    """
    for module, assignment in assignments.items():
        if assignment.transform is not None and assignment.transform.kind == "quad":
            raise UsageError(f"{module}: quad", "is not searched with scales", "use smooth_search: smoothquant")

    def of(module: str) -> Rounding | None:
        assignment = assignments.get(module)
        scheme = None if assignment is None else assignment.scheme
        if assignment is None or scheme is None:
            return None
        clip = assignment.options.mse_clip
        clips = assignment.quantizer != "rtn" if clip is None else clip

        def rounding(rows: Tensor) -> tuple[Quantize, Quantize]:
            transform = site_transform(
                assignment.transform, rows.shape[1], None, seed=seed, site=f"{assignment.module}.input"
            )
            return _rounding(rows, scheme, clips, _as_it_is if transform is None else lambda x: transform.input(x)[0])

        return Rounding(assignment.static_input, rounding)

    return of


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _rounding(rows: Tensor, scheme: LayerScheme, clips: bool, rotate: Quantize) -> tuple[Quantize, Quantize]:
    seen = rotate(rows)
    importance = seen.square().mean(dim=0)

    def of_weight(weight: Tensor) -> Tensor:
        main = rotate(weight)
        grid = choose_grid(main, scheme.weight, mse_clip=clips, importance=importance)
        return decode(encode(main, grid, scheme.weight), grid, scheme.weight)

    scale = None
    if scheme.input is not None and not scheme.input.dynamic:
        found = InputRange("a sampled site")
        found.add(seen)
        scale = found.scale(scheme.input.format)
    quantizer = InputQuantizer(scheme.input, scale)
    # One request of all sampled rows.
    return of_weight, lambda x: quantizer(rotate(x).unsqueeze(0)).squeeze(0)
