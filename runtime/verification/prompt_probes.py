"""What a package's graph for prompts must answer: every node's probe, and the losses of both graphs together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import DynamicCache

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.int8_weights import Int8Weights
from qtool.quantize.artifacts.package_files import FILL_MODEL
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.runtime.evaluate import Progress, evaluate_together
from qtool.runtime.reference.filled import FilledReference
from qtool.runtime.reference.model import ReferenceSession
from qtool.runtime.session import IntArray
from qtool.runtime.verification.node_model import PRODUCTS, TOKEN_INT8, PackageGraph
from qtool.runtime.verification.node_probes import Nodes, check_complete, make_probe
from qtool.runtime.verification.noise_floor import NoiseFloor
from qtool.runtime.verification.online_probes import check_surroundings, make_online_probe, online
from qtool.runtime.verification.probe_file import PromptProbes

NewCache = Callable[[Any], DynamicCache]
PREFIX = "prefill:"
# A step a row, in both runtimes: a fraction of what the model itself is compared on.
PROMPT_TOKENS = 48
NOISE_SEEDS = (1, 2)


def prompt_tokens(tokens: IntArray) -> IntArray:
    """The part [1, T] of the tokens [B, T] that both graphs together are compared on."""
    return tokens[:1, :PROMPT_TOKENS]


def open_prompt_graph(folder: Path, nodes: Nodes, threads: int | None) -> tuple[PackageGraph, Nodes]:
    """The graph, with its nodes and their surroundings checked to be the ones described."""
    graph = PackageGraph(folder, threads=threads, file=FILL_MODEL, prefix=PREFIX)
    check_complete(graph, nodes)
    check_surroundings(graph, nodes)
    return graph, nodes


def make_prompt_probes(
    folder: Path,
    checkpoint: QuantizedCheckpoint,
    described: Mapping[str, Any],
    tokens: IntArray,
    threads: int | None,
    progress: Progress,
    new_cache: NewCache | None = None,
) -> PromptProbes:
    """The probes of a package that was just written, from its checkpoint.

    Args:
        folder: the package.
        checkpoint: what it was made from.
        described: the graph's nodes by PREFIX + name, and which linears are INT8, from the package's details.
        tokens: what the whole model is compared on, [B, T].
        threads: of ONNX Runtime and of scoring.
        progress: (done, total, text).
        new_cache: of the reference, see ReferenceSession.
    """
    nodes: Nodes = described["nodes"]
    graph, _ = open_prompt_graph(folder, nodes, threads)
    weights = Int8Weights(checkpoint, described["int8"])
    _check_chosen(weights, nodes)
    probes = {name: make_probe(name, node, weights, with_bias=graph.has_bias(name)) for name, node in nodes.items()}
    around = {name: make_online_probe(name, nodes[name], weights) for name in online(nodes)}
    prompt = prompt_tokens(tokens)
    # A graph that has logits answers by itself; else the model steps behind what was filled.
    whole = ReferenceSession(weights) if described["logits"] else None
    with whole or FilledReference(checkpoint, new_cache=new_cache, int8=described["int8"]) as reference:
        noisy = [reference.perturbed(seed) for seed in NOISE_SEEDS]
        runs = evaluate_together(noisy, prompt, reference=reference, threads=threads, progress=progress)
    assert runs[0].reference_losses is not None
    floor = NoiseFloor.of(runs, sequences=1, positions=prompt.shape[1] - 1)
    return PromptProbes(nodes=probes, online=around, losses=runs[0].reference_losses, floor=floor)


def _check_chosen(weights: Int8Weights, nodes: Nodes) -> None:
    """Refuse a graph in which a linear is not in the form that was chosen for it."""
    scheme = layer_scheme("W8A8")
    for name, node in sorted(nodes.items()):
        wanted = {weights.schemes[module] == scheme for module in node["modules"]}
        if node["op"] in PRODUCTS and wanted != {node["op"] == TOKEN_INT8}:
            raise InputRefused(f"node {name}", "is not in the form that was chosen for it", "export again")
