"""A block's quantized linears, refined: codes and scales replaced by what signed-gradient rounding makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from qtool.quantize.artifacts.rule import QuantizerOptions
from qtool.quantize.quantizers.block_refinement import Example, refine_block
from qtool.quantize.quantizers.hessian import output_error, squared_norm
from qtool.quantize.quantizers.layers import QuantizedLayer
from qtool.quantize.quantizers.numerics import Grid, decode
from qtool.quantize.quantizers.signed_rounding import SignedRounding


@dataclass(frozen=True, kw_only=True)
class Refinable:
    """One linear before its refinement.

    Attributes:
        layer: as its first quantizer left it.
        weight: the float weight [N, K], before any transform.
        hessian: Σ x xᵀ of its input [K, K] float64, for the report.
        options: of its rule.
    """

    layer: QuantizedLayer
    weight: Tensor
    hessian: Tensor
    options: QuantizerOptions

    @property
    def main(self) -> Tensor:
        """What the codes stand for: the weight, or its main part where its input is transformed."""
        transform = self.layer.tensor.transform
        return self.weight if transform is None else transform.weight(self.weight)[0]


def refine_layers(
    block: nn.Module, prefix: str, linears: Mapping[str, Refinable], examples: Sequence[Example], *, seed: int
) -> dict[str, QuantizedLayer]:
    """Refine linears of one block together. Transforms, side products and low-rank corrections stay as they are.

    Args:
        block: with all its quantized linears in place; these get their refined weights.
        prefix: of the block's modules: "model.layers.3.".
        linears: by module; those of one block share the largest number of iterations, and of examples in a batch.
        examples: see `refine_block`.
        seed: of the order of examples.
    """
    roundings = {
        module.removeprefix(prefix): SignedRounding(
            linear.main, linear.layer.tensor.codes, _grid(linear.layer), linear.layer.tensor.scheme.weight
        )
        for module, linear in linears.items()
    }
    options = [linear.options for linear in linears.values()]
    refinement = refine_block(
        block,
        roundings,
        examples,
        iterations=max(each.iterations for each in options),
        batch=max(each.batch for each in options),
        seed=seed,
    )
    share = refinement.after / refinement.before if refinement.before > 0 else 1.0
    done = {}
    for module, linear in linears.items():
        codes, grid = refinement.results[module.removeprefix(prefix)]
        done[module] = _refined(linear, codes, grid, share)
        block.get_submodule(module.removeprefix(prefix)).weight.data = done[module].tensor.dequantize()
    return done


def _grid(layer: QuantizedLayer) -> Grid:
    tensor = layer.tensor
    return Grid(scale=tensor.scale, zero_point=tensor.zero_point, factor=tensor.scale_factor)


def _refined(linear: Refinable, codes: Tensor, grid: Grid, share: float) -> QuantizedLayer:
    tensor = replace(linear.layer.tensor, codes=codes, scale=grid.scale)
    weight, transform = linear.main, tensor.transform
    hessian = linear.hessian if transform is None else transform.second_moment(linear.hessian)
    difference = decode(codes, grid, tensor.scheme.weight) - weight
    if tensor.low_rank is not None:
        difference = difference + tensor.low_rank.weight
    power = squared_norm(weight)
    record = replace(
        linear.layer.record,
        weight_error=squared_norm(difference) / power if power > 0 else 0.0,
        output_error=output_error(difference, weight, hessian),
        refined=share,
    )
    return QuantizedLayer(tensor=tensor, record=record)
