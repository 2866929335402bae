"""Verification of a package, after export against its checkpoint and later against what it answered then.

    nodes     every lowered node on the same input as the checkpoint          error ≤ 1e-5
    online    the transforms in front of nodes, the side products behind      error ≤ 1e-5
    model     the package's logits against the torch reference's              ≤ 3 × the measured noise floor
    decode    token by token against prefill, in ONNX Runtime                 ≤ 3 × the measured noise floor
    prompts   where a second graph reads them: its nodes as above, and both graphs together as `model`
    genai     onnxruntime-genai loads the folder and generates
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.package_files import FILL_MODEL
from qtool.quantize.artifacts.store import open_artifact
from qtool.quantize.artifacts.weights import WeightSource
from qtool.runtime.device import DEVICE_TARGETS
from qtool.runtime.evaluate import Progress, evaluate, evaluate_together
from qtool.runtime.ort.session import GENAI_CONFIG, OrtSession
from qtool.runtime.reference.int8_cache import Scales, StaticInt8Cache
from qtool.runtime.reference.model import ReferenceSession
from qtool.runtime.session import IntArray
from qtool.runtime.verification.genai import NOT_INSTALLED, genai_generates
from qtool.runtime.verification.node_model import PackageGraph
from qtool.runtime.verification.node_probes import (
    TOLERANCE,
    NodeProbe,
    Nodes,
    check_complete,
    check_covered,
    make_probe,
    probe_error,
)
from qtool.runtime.verification.noise_floor import Distance, NoiseFloor
from qtool.runtime.verification.online_probes import (
    OnlineProbe,
    check_surrounded,
    check_surroundings,
    make_online_probe,
    online,
    online_error,
)
from qtool.runtime.verification.probe_file import Probes, PromptProbes, read_probes, write_probes
from qtool.runtime.verification.prompt_probes import make_prompt_probes, open_prompt_graph, prompt_tokens

DECODE_TOKENS = 96
NOISE_SEEDS = (1, 2)
PROMPT_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test. A number passes when its magnitude is at most the limit of the same name; NaN fails."""

    name: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    forced: Literal["pass", "fail", "skipped"] | None = None

    @property
    def outcome(self) -> Literal["pass", "fail", "skipped"]:
        """What came of it."""
        if self.forced is not None:
            return self.forced
        return "fail" if self._beyond() else "pass"

    @property
    def failure(self) -> str:
        """The numbers beyond their limits, or the detail of a check without numbers."""
        beyond = [f"{name} {self.numbers[name]:.3g}, limit {self.limits[name]:.3g}" for name in self._beyond()]
        return ", ".join(beyond + ([self.detail] if self.detail else []))

    def _beyond(self) -> list[str]:
        return [name for name, limit in self.limits.items() if not abs(self.numbers[name]) <= limit]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All tests of one package."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return bool(self.checks) and all(check.outcome != "fail" for check in self.checks)

    @property
    def failure(self) -> str:
        """Which checks failed and by which numbers, in a phrase; empty when none did."""
        return "; ".join(f"{check.name}: {check.failure}" for check in self.checks if check.outcome == "fail")

    def to_bytes(self) -> bytes:
        """`to_json` as canonical JSON: sorted keys, two spaces, a final newline."""
        return (json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    def to_json(self) -> dict[str, Any]:
        """Plain data without times; numbers to 4 significant digits, null where not finite."""
        return {
            "passed": self.passed,
            "checks": [
                {
                    "name": check.name,
                    "outcome": check.outcome,
                    "detail": check.detail,
                    "numbers": {name: _rounded(value) for name, value in sorted(check.numbers.items())},
                    "limits": {name: _rounded(value) for name, value in sorted(check.limits.items())},
                }
                for check in self.checks
            ],
        }


def verify_export(
    folder: Path,
    source: WeightSource,
    details: Mapping[str, Any],
    tokens: IntArray,
    *,
    progress: Progress,
    threads: int | None = None,
    scales: Scales | None = None,
) -> Verification:
    """Verify a package that was just written, and write its probes.safetensors.

    Args:
        folder: the package, still in its staging folder; no manifest needed.
        source: the checkpoint (or float model) it was made from.
        details: what the manifest will say of it; "nodes" lists the lowered nodes.
        tokens: ids [B, T] to compare the whole model on; a few hundred are enough.
        progress: (done, total, text).
        threads: of the runtime and of scoring; None for all cores.
        scales: of its INT8 cache; None for a cache of floats.

    Raises:
        InputRefused: when the package cannot be run, or its nodes are not the ones described.
    """
    nodes: Nodes = details["nodes"]
    graph = PackageGraph(folder, threads=threads)
    check_complete(graph, nodes)
    check_surroundings(graph, nodes)
    probes: dict[str, NodeProbe] = {}
    surroundings: dict[str, OnlineProbe] = {}
    if isinstance(source, QuantizedCheckpoint):
        check_covered(source, nodes)
        check_surrounded(source, nodes)
        for i, (name, node) in enumerate(sorted(nodes.items())):
            probes[name] = make_probe(name, node, source, with_bias=graph.has_bias(name))
            if "online" in node:
                surroundings[name] = make_online_probe(name, node, source)
            progress(i + 1, len(nodes), "expected answers")
    node_checks = _check_nodes(graph, probes, nodes, surroundings, progress)
    prompts, new_cache = None, None if scales is None else partial(StaticInt8Cache, scales)
    if "prefill" in details:
        assert isinstance(source, QuantizedCheckpoint)
        prompts = make_prompt_probes(folder, source, details["prefill"], tokens, threads, progress, new_cache)
    decode_tokens = tokens[:1, :DECODE_TOKENS]
    length = tokens.shape[1]
    opened = ReferenceSession(source, new_cache=new_cache), _open(folder, threads, length)
    with opened[0] as reference, opened[1] as session:
        noisy = [reference.perturbed(seed) for seed in NOISE_SEEDS]
        subject, *runs = evaluate_together(
            [session, *noisy], tokens, reference=reference, threads=threads, progress=progress
        )
        floor = NoiseFloor.of(runs, sequences=len(tokens), positions=length - 1)
        decode_floor = NoiseFloor.of(runs, sequences=1, positions=decode_tokens.shape[1] - 1)
        assert subject.reference_losses is not None
        distance = Distance.between(subject.losses, subject.reference_losses, subject.kl)
        model_check = _check_distance("model", distance, floor, subject.top1_agreement)
        decode_check = _check_decode(session, decode_tokens, decode_floor, threads, progress)
        genai_check = _check_genai(folder, tokens, session.vocab_size)
    write_probes(
        folder,
        Probes(
            nodes=probes,
            online=surroundings,
            tokens=tokens,
            reference_losses=subject.reference_losses,
            floor=floor,
            decode_floor=decode_floor,
            prompts=prompts,
        ),
    )
    prompt_checks = _check_prompts(folder, details, prompts, tokens, threads, progress)
    return Verification(checks=(*node_checks, model_check, decode_check, *prompt_checks, genai_check))


def verify_package(folder: Path, *, progress: Progress, threads: int | None = None) -> Verification:
    """Verify a finished package without its checkpoint: every byte, then what it answers.

    Raises:
        InputRefused: when a byte changed, or the package cannot be run.
    """
    manifest = open_artifact(folder, kind="package")
    if manifest.details["target"] == "npu":
        from qtool.runtime.npu.verify import verify_npu_package  # it builds on this module

        return verify_npu_package(folder, progress=progress, threads=threads)
    if manifest.details["target"] in DEVICE_TARGETS:
        from qtool.runtime.device.verify import verify_device_package  # it builds on this module

        return verify_device_package(folder, progress=progress, threads=threads)
    probes = read_probes(folder)
    nodes: Nodes = manifest.details["nodes"]
    graph = PackageGraph(folder, threads=threads)
    check_complete(graph, nodes)
    check_complete(graph, {name: {"op": graph.lowered.get(name, "")} for name in probes.nodes})
    check_surroundings(graph, nodes)
    if online(nodes).keys() != probes.online.keys():
        raise InputRefused(folder, "its stored answers do not fit its transforms", "export the package again")
    node_checks = _check_nodes(graph, probes.nodes, nodes, probes.online, progress)
    with _open(folder, threads, probes.tokens.shape[1]) as session:
        subject = evaluate(session, probes.tokens, threads=threads, progress=progress)
        distance = Distance.between(subject.losses, probes.reference_losses, None)
        model_check = _check_distance("model", distance, probes.floor, None)
        decode_tokens = probes.tokens[:1, :DECODE_TOKENS]
        decode_check = _check_decode(session, decode_tokens, probes.decode_floor, threads, progress)
        genai_check = _check_genai(folder, probes.tokens, session.vocab_size)
    prompt_checks = _check_prompts(folder, manifest.details, probes.prompts, probes.tokens, threads, progress)
    return Verification(checks=(*node_checks, model_check, decode_check, *prompt_checks, genai_check))


def _open(folder: Path, threads: int | None, length: int) -> OrtSession:
    """The model by itself; a graph for prompts is checked on its own."""
    return OrtSession(folder, threads=threads, max_length=length, fill=False)


def _check_prompts(
    folder: Path,
    details: Mapping[str, Any],
    probes: PromptProbes | None,
    tokens: IntArray,
    threads: int | None,
    progress: Progress,
) -> list[Check]:
    described = "prefill" in details
    if described != (probes is not None) or described != (folder / FILL_MODEL).is_file():
        raise InputRefused(folder, "its graph for prompts, or what it must answer, is missing or extra", "export again")
    if probes is None:
        return []
    graph, nodes = open_prompt_graph(folder, details["prefill"]["nodes"], threads)
    node_checks = [
        replace(check, name=f"prompt {check.name}")
        for check in _check_nodes(graph, probes.nodes, nodes, probes.online, progress)
    ]
    prompt = prompt_tokens(tokens)
    with OrtSession(folder, threads=threads, max_length=prompt.shape[1]) as session:
        subject = evaluate(session, prompt, threads=threads, progress=progress)
    distance = Distance.between(subject.losses, probes.losses, None)
    return [*node_checks, _check_distance("prompts", distance, probes.floor, None)]


def _check_nodes(
    graph: PackageGraph,
    probes: Mapping[str, NodeProbe],
    nodes: Nodes,
    surroundings: Mapping[str, OnlineProbe],
    progress: Progress,
) -> list[Check]:
    if not probes:
        return [Check(name="nodes", detail="skipped: no quantized node", forced="skipped")]
    errors: dict[str, float] = {}
    for i, (name, probe) in enumerate(sorted(probes.items())):
        errors[name] = probe_error(graph, name, probe)
        progress(i + 1, len(probes), "nodes")
    checks = [_worst("nodes", errors)]
    around = online(nodes)
    outside: dict[str, float] = {}
    for i, (name, surrounding) in enumerate(sorted(surroundings.items())):
        outside[name] = online_error(graph, name, around[name], surrounding)
        progress(i + 1, len(surroundings), "online")
    return [*checks, _worst("online", outside)] if outside else checks


def _worst(check: str, errors: Mapping[str, float]) -> Check:
    worst = max(errors, key=lambda name: np.inf if np.isnan(errors[name]) else errors[name])
    return Check(
        name=check,
        numbers={"error": errors[worst], "nodes": float(len(errors))},
        limits={"error": TOLERANCE},
        detail=f"largest error at {worst}",
    )


def _check_decode(
    session: OrtSession, tokens: IntArray, floor: NoiseFloor, threads: int | None, progress: Progress
) -> Check:
    steps = evaluate(session, tokens, reference=session, by_decode=True, threads=threads, progress=progress)
    assert steps.reference_losses is not None
    distance = Distance.between(steps.losses, steps.reference_losses, steps.kl)
    return _check_distance("decode", distance, floor, steps.top1_agreement)


def _check_distance(name: str, distance: Distance, floor: NoiseFloor, agreement: float | None) -> Check:
    numbers = {name: value for name, value in vars(distance).items() if not np.isnan(value)}
    floors = {f"floor_{name}": value for name, value in vars(floor).items()}
    if agreement is not None:
        numbers["top1_agreement"] = agreement
    return Check(
        name=name,
        numbers={**numbers, **floors},
        limits={key: limit for key, limit in floor.limits.items() if key in numbers},
        detail="" if "kl_nats" in numbers else "against the losses stored at export",
    )


def _check_genai(folder: Path, tokens: IntArray, vocab_size: int) -> Check:
    if not (folder / GENAI_CONFIG).is_file():
        return Check(name="genai", detail="skipped: the layout is another one", forced="skipped")
    answer = genai_generates(folder, [int(i) for i in tokens[0, :PROMPT_TOKENS]], vocab_size)
    if answer == NOT_INSTALLED:
        return Check(name="genai", detail=answer, forced="skipped")
    return Check(name="genai", detail=answer, forced="pass" if answer == "pass" else "fail")


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
