"""What really runs: the optimized graph of a model, linear by linear, with its price and its traps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qtool.runtime.explain.costs import (
    ATTENTION,
    MEASURED_ON,
    Cost,
    attention_cost,
    cache_bytes_per_token,
    linear_cost,
    other_cost,
    shares,
)
from qtool.runtime.explain.facts import Facts
from qtool.runtime.explain.head import head_of, last_token_only
from qtool.runtime.explain.kernels import Kernel, recognise
from qtool.runtime.explain.linears import linear_name, linear_of, role_of
from qtool.runtime.explain.online import site_of, sites_of
from qtool.runtime.explain.optimized_graph import Optimized, Settings, optimize
from qtool.runtime.explain.report import Explanation, LinearReport, OnlineShare, Part
from qtool.runtime.explain.traps import find_traps

# Nodes that move no data.
FREE = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Shape")
ATTENTION_PART, ONLINE_PART, OTHER_PART = "attention", "online transforms, other nodes", "other nodes"
UNTRACED = Kernel(label="not found in the optimized graph", compute="unknown", activations="unknown", rate="float")


def explain(path: Path, settings: Settings | None = None, *, length: int = 512) -> Explanation:
    """Optimize a model file as a session would, and say what runs.

    Args:
        path: an .onnx file; its weights are never read (see `stand_in`).
        settings: session options; None for the runtime's defaults.
        length: tokens of the prompt, and in the cache of the decode step, of the predicted shares.

    Raises:
        UsageError, InputRefused, EnvironmentFault: see `optimize`.
    """
    settings = settings or Settings()
    optimized = optimize(path, settings)
    view = optimized.view
    found = [_linear(optimized, index, settings.config, length) for index in range(len(optimized.linears))]
    parts = _parts(optimized, length)
    costs = {str(index): cost for index, (_, cost) in enumerate(found)}
    share = shares(costs | {name: cost for name, (_, cost) in parts.items()})
    linears = [
        replace(report, decode_share=share[str(index)][0], prefill_share=share[str(index)][1])
        for index, (report, _) in enumerate(found)
    ]
    names = {
        id(optimized.ran_as[index]): report.name for index, report in enumerate(linears) if index in optimized.ran_as
    }
    online = _online(optimized, linears, share.get(ONLINE_PART, (0.0, 0.0)))
    facts = Facts(
        source=optimized.source,
        view=view,
        linears=tuple(linears),
        level=optimized.level,
        refused=optimized.refused,
        names=names,
        online=online,
    )
    return Explanation(
        file=str(path),
        onnxruntime=optimized.onnxruntime,
        level=optimized.level,
        config=dict(settings.config),
        predicted_from=MEASURED_ON,
        length=length,
        linears=tuple(linears),
        parts=tuple(
            Part(
                name=name,
                nodes=nodes,
                decode_us=cost.decode_us,
                prefill_us=cost.prefill_us,
                decode_share=share[name][0],
                prefill_share=share[name][1],
            )
            for name, (nodes, cost) in parts.items()
        ),
        nodes=dict(sorted(Counter(node.op_type for node in view.nodes).items())),
        traps=find_traps(facts),
        weight_bytes=sum(linear.weight_bytes for linear in linears),
        cache_bytes=cache_bytes_per_token(view) * length,
        online=online,
    )


def _linear(optimized: Optimized, index: int, config: Mapping[str, str], length: int) -> tuple[LinearReport, Cost]:
    source = optimized.linears[index]
    node = optimized.ran_as.get(index)
    ran = linear_of(optimized.view, node) if node is not None else None
    linear = ran or source
    kernel = recognise(optimized.view, node, config) if node is not None else UNTRACED
    name = linear_name(source)
    single = node is not None and node is head_of(optimized.view) and last_token_only(optimized.view)
    cost = linear_cost(linear, kernel, 1 if single else length)
    report = LinearReport(
        name=name,
        role=role_of(name),
        source=str(source.node.op_type),
        stored=source.stored_as,
        node=str(node.name) if node is not None else "",
        kernel=kernel.label,
        compute=kernel.compute,
        activations=kernel.activations,
        k=linear.k,
        n=linear.n,
        weight_bytes=linear.weight_bytes,
        decode_us=cost.decode_us,
        prefill_us=cost.prefill_us,
    )
    return report, cost


def _parts(optimized: Optimized, length: int) -> dict[str, tuple[int, Cost]]:
    """Attention, online transforms and all other nodes: how many of each, and their price."""
    linears = [linear for node in optimized.ran_as.values() if (linear := linear_of(optimized.view, node))]
    counted = {id(node) for linear in linears for node in (linear.node, *linear.between)}
    counted |= {id(node) for node in optimized.ran_as.values()}
    rest = [node for node in optimized.view.nodes if id(node) not in counted]
    attention = [node for node in rest if node.op_type in ATTENTION]
    online = [node for node in rest if node.op_type not in FREE and site_of(str(node.name)) is not None]
    apart = {id(node) for node in online}
    others = [node for node in rest if node.op_type not in (*ATTENTION, *FREE) and id(node) not in apart]
    width = _median([linear.k for linear in linears])
    parts = {}
    if attention:
        parts[ATTENTION_PART] = (len(attention), attention_cost(optimized.view, length))
    if online:
        parts[ONLINE_PART] = (len(online), other_cost(len(online), width, length))
    if others:
        parts[OTHER_PART] = (len(others), other_cost(len(others), width, length))
    return parts


def _online(
    optimized: Optimized, linears: Sequence[LinearReport], rest: tuple[float, float]
) -> OnlineShare | None:
    """The online transforms: their products, which are linears, and the other nodes, of which the shares are given."""
    names = [str(node.name) for node in optimized.view.nodes]
    online = [name for name in names if site_of(name) is not None]
    if not online:
        return None
    products = [linear for linear in linears if site_of(linear.node) is not None]
    return OnlineShare(
        nodes=len(online),
        sites=sites_of(online),
        decodes=any(not name.startswith("present") for name in optimized.view.outputs),
        decode_share=rest[0] + sum(linear.decode_share for linear in products),
        prefill_share=rest[1] + sum(linear.prefill_share for linear in products),
    )


def _median(numbers: list[int]) -> int:
    return sorted(numbers)[len(numbers) // 2] if numbers else 0


