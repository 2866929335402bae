"""The linears that read one input: it is prepared once for each scheme among them, and multiplied by merged weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.kernels.quantize_activation import prepare_rows
from qtool.kernels.runtime_smooth import Requests
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.runtime.native.kernel_table import reads_sums
from qtool.runtime.native.linear import Dequantized, NativeLinear, float_linear, quantized_linear
from qtool.runtime.native.merge import Given, merge
from qtool.runtime.native.site_input import SiteInput, Source


class Readers:
    """See the module.

    Args:
        given: the linears in the order of the outputs.
        dtype: of activations.
        out_dtype: of outputs; None: the activations'.
    """

    def __init__(self, given: Sequence[Given], dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self.widths = [part.width for part in given]
        self.linears: list[NativeLinear] = []
        self._inputs: list[SiteInput] = []
        self._input_of: list[int] = []
        self._slots: list[list[int]] = []
        place = {part.name: index for index, part in enumerate(given)}
        for group in _by_input(given):
            made = [_linear(part, out_dtype or dtype) for part in merge(group)]
            self._inputs += _inputs(made, group, dtype)
            self._input_of += [len(self._inputs) - 1 if _coded(linear) else -1 for linear in made]
            self.linears += made
            self._slots += [[place[name] for name in linear.name.split(" + ")] for linear in made]
        self._plain = SiteInput.plain(dtype)

    def __call__(self, x: Tensor, source: Source, requests: Requests) -> list[Tensor]:
        """x [M, …] behind `source` to one [M, N] for each linear, in order; they may share memory."""
        several = len(set(self._input_of)) > 1
        if several and source is not None:
            # A norm writes its residual back: it must run once.
            x, source = prepare_rows(x, self._dtype, source=source), None
        prepared = {
            at: (self._plain if at < 0 else self._inputs[at])(x, source, requests) for at in sorted(set(self._input_of))
        }
        outputs: list[Tensor | None] = [None] * len(self.widths)
        for linear, at, slots in zip(self.linears, self._input_of, self._slots, strict=True):
            parts = torch.split(linear(prepared[at]), [self.widths[slot] for slot in slots], dim=1)
            for slot, part in zip(slots, parts, strict=True):
                outputs[slot] = part
        return [part for part in outputs if part is not None]


def _coded(linear: NativeLinear) -> bool:
    """Whether a linear reads its site's transform and codes, not the plain input."""
    return not isinstance(linear.product, Dequantized) and linear.product.op != "float"


def _linear(part: Given, out_dtype: torch.dtype) -> NativeLinear:
    if isinstance(part.weight, Tensor):
        return float_linear(part.name, part.weight, part.bias, out_dtype)
    return quantized_linear(part.name, part.weight, part.bias, out_dtype)


def _by_input(given: Sequence[Given]) -> list[list[Given]]:
    """Linears grouped by what is done to their input."""
    groups: dict[object, list[Given]] = {}
    for part in given:
        weight = part.weight
        key: object = None
        if isinstance(weight, QuantizedTensor):
            static = None if weight.input_scale is None else float(weight.input_scale)
            key = (weight.site, weight.scheme.input, static)
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def _inputs(made: Sequence[NativeLinear], group: Sequence[Given], dtype: torch.dtype) -> list[SiteInput]:
    """The one input that a group's coded linears read, none if there is no such linear."""
    weights = [part.weight for part in group if isinstance(part.weight, QuantizedTensor)]
    if not weights or not any(_coded(linear) for linear in made):
        return []
    keep = any(weight.low_rank is not None for weight in weights)
    sums = any(reads_sums(weight) for weight in weights)
    return [SiteInput.of(weights[0], dtype, keep=keep, sums=sums)]


