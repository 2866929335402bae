"""What surrounds a lowered node, against its checkpoint on the same input: the transform in front of it, what is added
behind.

Neither is quantized, so a difference is a mistake and not a rounding that fell the other way. A site's channels are
judged against what they typically carry and a tenth of what their block does; a linear's channels against the
magnitude of their side products, sqrt(Σ (side w)²), and a tenth of the product they are added to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.verification.node_model import PackageGraph
from qtool.runtime.verification.node_probes import Nodes, relative_error
from qtool.runtime.verification.probe_inputs import probe_inputs

SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class OnlineProbe:
    """What the surroundings of one node must answer.

    Attributes:
        columns: K; block_size: columns per scale.
        main, main_bound: what the node is handed [M, K], and the magnitude that errors of a channel are relative to.
        output, output_bound: the product with all that is added, [M, N] and [N]; [M, 0] and [0] where nothing is.
    """

    columns: int
    block_size: int
    main: FloatArray
    main_bound: FloatArray
    output: FloatArray
    output_bound: FloatArray


def online(nodes: Nodes) -> dict[str, Mapping[str, Any]]:
    """The surroundings of every node that has some."""
    return {name: node["online"] for name, node in nodes.items() if "online" in node}


def make_online_probe(name: str, node: Mapping[str, Any], checkpoint: QuantizedCheckpoint) -> OnlineProbe:
    """The probe of one node's surroundings, from the checkpoint alone."""
    first, modules = node["modules"][0], node["modules"]
    columns, block_size = checkpoint.shapes[first][1], int(node["block_size"])
    x = torch.from_numpy(_rows(name, columns, block_size))
    found = checkpoint.site_transform(first)
    main, side = (x, None) if found is None else found[1].input(x)
    added = [_added(checkpoint, module, main, side) for module in modules]
    output, magnitude = (np.concatenate([part[i].numpy() for part in added], axis=-1) for i in (0, 1))
    product = _product(name, len(x), output.shape[1], block_size)
    bound = magnitude + SHARE * np.abs(product).mean(axis=0)
    if not _adds(checkpoint, modules):
        output, product, bound = output[:, :0], product[:, :0], bound[:0]
    return OnlineProbe(
        columns=columns,
        block_size=block_size,
        main=main.to(torch.float32).numpy(),
        main_bound=_typical(main, block_size).numpy(),
        output=(output + product).astype(np.float32),
        output_bound=bound.astype(np.float32),
    )


def online_error(graph: PackageGraph, name: str, surroundings: Mapping[str, Any], probe: OnlineProbe) -> float:
    """The largest error of the surroundings' channels relative to their bound.

    Raises:
        InputRefused: when the values are not connected as described.
    """
    x, main = str(surroundings["input"]), str(surroundings["main"])
    product, output = str(surroundings["product"]), str(surroundings["output"])
    rows = _rows(name, probe.columns, probe.block_size)
    error = 0.0
    if main != x:
        error = relative_error(graph.between({x: rows}, main), probe.main, probe.main_bound)
    if output == product:
        return error if probe.output.shape[1] == 0 else float("inf")
    feeds = {x: rows, product: _product(name, len(rows), probe.output.shape[1], probe.block_size)}
    added = relative_error(graph.between(feeds, output), probe.output, probe.output_bound)
    return added if np.isnan(added) else max(error, added)


def check_surroundings(graph: PackageGraph, nodes: Nodes) -> None:
    """Refuse a graph in which a node does not stand between the values described, or its product goes around what is
    added to it.

    Raises:
        InputRefused: naming the node.
    """
    for name, around in sorted(online(nodes).items()):
        if graph.surrounded(name) != (around["main"], around["product"]):
            raise InputRefused(f"node {name}", "does not stand where its package says", "export again")
        if around["output"] == around["product"]:
            continue
        added = graph.read_between(around["product"], (around["input"], around["product"]), around["output"])
        if not added or not graph.readers(around["output"]):
            raise InputRefused(f"node {name}", "hands its product out without what is added to it", "export again")


def check_surrounded(checkpoint: QuantizedCheckpoint, nodes: Nodes) -> None:
    """Refuse a package that leaves out a transform or a side product of its checkpoint."""
    for name, node in sorted(nodes.items()):
        wanted = any(checkpoint.transformed(module) for module in node["modules"])
        if wanted != ("online" in node):
            raise InputRefused(f"node {name}", "is not surrounded as its checkpoint wants it", "export again")


def _adds(checkpoint: QuantizedCheckpoint, modules: list[str]) -> bool:
    found = checkpoint.site_transform(modules[0])
    return bool(found and found[1].side_width) or any(checkpoint.low_rank(module) is not None for module in modules)


def _added(checkpoint: QuantizedCheckpoint, module: str, main: Tensor, side: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is added to one module's product [M, N], and its magnitude by channel [N], float64."""
    shape = (len(main), checkpoint.shapes[module][0])
    total, square = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    weight, low_rank = checkpoint.side(module), checkpoint.low_rank(module)
    pairs = [] if side is None or weight is None else [(side, weight)]
    pairs += [] if low_rank is None else [(main @ low_rank.down.T, low_rank.up)]
    for thin, rows in pairs:
        total += thin.double() @ rows.double().T
        square += thin.double().square() @ rows.double().square().T
    return total, square.sqrt().mean(dim=0)


def _typical(main: Tensor, block_size: int) -> Tensor:
    """[K]: the root mean square of a channel over the rows, and SHARE of its block's."""
    power = main.double().square().mean(dim=0)
    starts = range(0, len(power), block_size)
    blocks = [power[start : start + block_size] for start in starts]
    around = torch.cat([block.mean().sqrt().expand(len(block)) for block in blocks])
    return (power.sqrt() + SHARE * around).to(torch.float32)


def _rows(name: str, columns: int, block_size: int) -> FloatArray:
    return probe_inputs(f"{name}/input", columns, block_size, _unscaled(columns, block_size))


def _product(name: str, rows: int, columns: int, block_size: int) -> FloatArray:
    values = probe_inputs(f"{name}/product", columns, block_size, _unscaled(columns, block_size))
    return values[np.arange(rows) % len(values)]


def _unscaled(columns: int, block_size: int) -> npt.NDArray[np.int8]:
    return np.zeros(-(-columns // block_size), dtype=np.int8)
