"""What surrounds the codes of a linear: its site's transform in front, side products behind.

    main, side = transform(x)                        once per site, for all linears that read it
    y = linear(main) + side × side weightᵀ + (main × downᵀ) × upᵀ

in the order of the torch reference. A linear that computes several modules has one side weight, their rows one below
the other, and one low-rank product: the downs one below the other, the ups on the diagonal of one matrix, which the
runtime puts together when it loads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qtool.quantize.export.onnx.linears import Linear, emit_linear, find_linears
from qtool.quantize.export.onnx.online_nodes import NodeWriter, Values, write_transform
from qtool.quantize.transforms.low_rank import LowRank
from qtool.quantize.transforms.site_transform import SiteTransform


class Transformed(Protocol):
    """What the pass asks of a checkpoint."""

    def site_transform(self, module: str) -> tuple[str, SiteTransform] | None:
        """A site's name and its transform."""
        ...

    def side(self, module: str) -> Tensor | None:
        """[N, r] float32, holding float16 values."""
        ...

    def low_rank(self, module: str) -> LowRank | None:
        """Factors holding float16 values."""
        ...


@dataclass(frozen=True, kw_only=True)
class Online:
    """One linear with what surrounds it.

    Attributes:
        site: the name of the transformed input, "" without a transform.
        transform: None where only side products were added.
        low_rank: ranks of the corrections, one a module.
        x: what the site is made of.
        output: the linear's result with all side products; None where there are none.
        initializers: all that was stored for it; those of a site with the first linear that reads it.
    """

    site: str
    transform: SiteTransform | None
    low_rank: tuple[int, ...]
    x: ir.Value
    output: ir.Value | None
    initializers: tuple[ir.Value, ...]

    def describe(self, main: str, product: str) -> dict[str, Any]:
        """Plain data: what is computed, between values of these names. `main` and `product` are the codes' own input
        and output."""
        output = product if self.output is None else str(self.output.name)
        around: dict[str, Any] = {"input": str(self.x.name), "main": main, "product": product, "output": output}
        around["low_rank"] = list(self.low_rank)
        if self.transform is not None:
            around |= {"site": self.site, "transform": self.transform.header()}
            around["side_width"] = self.transform.side_width
        return around


class OnlineTransforms(ir.passes.InPlacePass):
    """Surround every linear that computes one of the modules. Linears must be uniform in their site.

    Args:
        modules: those with a transform or a side product.
        source: what they are.

    Attributes:
        online: what was done, by the linear's name.
    """

    def __init__(self, modules: Collection[str], source: Transformed) -> None:
        super().__init__()
        self._modules, self._source = modules, source
        self._sites: dict[tuple[ir.Value, str], Values] = {}
        self.online: dict[str, Online] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        place = {node: index for index, node in enumerate(model.graph)}
        found = find_linears(model.graph)
        linears = [linear for linear in found if any(module in self._modules for module in linear.modules)]
        # A site's nodes stand at its first linear, so that one must be the first in the graph too.
        for linear in sorted(linears, key=lambda linear: place[linear.nodes[-1]]):
            self._surround(model.graph, linear)
        return ir.passes.PassResult(model, bool(linears))

    def _surround(self, graph: ir.Graph, linear: Linear) -> None:
        found, source = self._source.site_transform(linear.modules[0]), self._source
        before, after = NodeWriter(graph, found[0] if found else ""), NodeWriter(graph, linear.name)
        main, side = linear.x, None
        if found is not None:
            key = (linear.x, found[0])
            if key not in self._sites:
                self._sites[key] = write_transform(before, found[1], linear.x)
            main, side = self._sites[key]
        nodes, out = emit_linear(main, linear.weights, linear.biases)
        if side is not None and found is not None:
            rows = _Rows(linear.modules, lambda module: _required(source.side(module)))
            weight = after.floats("side", rows.tensor(f"{linear.name}.side", (sum(linear.rows), found[1].side_width)))
            out = after.op("side", "Add", out, after.transposed_product("side", side, weight))
        corrections = [source.low_rank(module) for module in linear.modules]
        ranks = tuple(0 if low_rank is None else len(low_rank.down) for low_rank in corrections)
        if any(ranks):
            out = after.op("low_rank", "Add", out, self._low_rank(after, linear, ranks, main))
        ir.convenience.replace_nodes_and_values(
            graph,
            linear.nodes[-1],
            linear.nodes,
            [*before.nodes, *nodes, *after.nodes],
            [linear.output],
            [out],
        )
        self.online[linear.name] = Online(
            site=found[0] if found else "",
            transform=found[1] if found else None,
            low_rank=ranks,
            x=linear.x,
            output=out if after.nodes else None,
            initializers=(*before.initializers, *after.initializers),
        )

    def _low_rank(self, writer: NodeWriter, linear: Linear, ranks: tuple[int, ...], main: ir.Value) -> ir.Value:
        corrected = [(i, module) for i, module in enumerate(linear.modules) if ranks[i]]
        downs = _Rows([module for _, module in corrected], lambda module: self._factors(module).down)
        name = f"{linear.name}.low_rank_down"
        down = writer.floats("low_rank_down", downs.tensor(name, (sum(ranks), linear.columns)))
        ups = [self._up(writer, linear, ranks, index) for index, _ in corrected]
        up = ups[0] if len(ups) == 1 else writer.op("low_rank_up", "Sum", *ups)
        thin = writer.transposed_product("low_rank_down", main, down)
        return writer.transposed_product("low_rank_up", thin, up)

    def _up(self, writer: NodeWriter, linear: Linear, ranks: tuple[int, ...], index: int) -> ir.Value:
        """One module's up, [N, r], in its place on the diagonal of [ΣN, Σr]."""
        one = _Rows([linear.modules[index]], lambda module: self._factors(module).up)
        part, shape = f"low_rank_up_{index}", (linear.rows[index], ranks[index])
        up = writer.floats(part, one.tensor(f"{linear.name}.{part}", shape))
        if len(linear.modules) == 1:
            return up
        before = (sum(linear.rows[:index]), sum(ranks[:index]))
        after = (sum(linear.rows[index + 1 :]), sum(ranks[index + 1 :]))
        pads = writer.stored(f"{part}_pads", ir.tensor(np.array([*before, *after])))
        return writer.op(part, "Pad", up, pads)

    def _factors(self, module: str) -> LowRank:
        found = self._source.low_rank(module)
        assert found is not None
        return found


class _Rows:
    """Rows of several modules, one below the other, as a float16 tensor that is read when it is written."""

    def __init__(self, modules: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self._modules, self._read_one = tuple(modules), read

    def tensor(self, name: str, shape: tuple[int, int]) -> ir.LazyTensor:
        return ir.LazyTensor(self._read, dtype=ir.DataType.FLOAT16, shape=ir.Shape(shape), name=name)

    def _read(self) -> ir.TensorProtocol:
        rows = torch.cat([self._read_one(module) for module in self._modules])
        return ir.tensor(rows.to(torch.float16).numpy())


def _required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
