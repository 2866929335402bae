"""Verification of a package for a GPU, on the CPU, when it is exported and later.

    checker   onnx's own checker, with strict inference of types and shapes
    form      the patterns that the runtime documents, linear by linear
    weights   what the file stores, dequantized by the operators' definitions, against the checkpoint
    range     the largest magnitude of any float16 tensor, against float16's end
    model     logits on ONNX Runtime's CPU provider against the torch reference
    decode    token by token with a past, against prefill
    genai     cuda: onnxruntime-genai loads the folder and generates, the provider that it names left out
    answers   later: the losses against those stored at export

The graphs compute in float16: 2e-7 to 2e-5 nats with float inputs, for which the limit is 0.002. Where inputs are
quantized, float16 flips roundings too, and no two runs agree better than the reference with a little noise agrees with
itself (noise_floor.py): three times that distance is added to the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.package_files import model_path
from qtool.quantize.artifacts.store import open_artifact, write_file
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.runtime.device.cuda_form import cuda_breaches
from qtool.runtime.device.graph_file import GraphFile, checker_breaches
from qtool.runtime.device.half_range import LARGEST_HALF, largest_value
from qtool.runtime.device.stored_weights import largest_weight_error
from qtool.runtime.device.tensorrt_form import tensorrt_breaches
from qtool.runtime.device.tensorrt_session import TensorRtSession
from qtool.runtime.evaluate import Progress, evaluate, evaluate_together
from qtool.runtime.ort.session import OrtSession
from qtool.runtime.reference.model import ReferenceSession
from qtool.runtime.session import IntArray, Session
from qtool.runtime.verification.genai import NOT_INSTALLED, genai_generates
from qtool.runtime.verification.noise_floor import FACTOR, Distance, NoiseFloor
from qtool.runtime.verify import Check, Verification

ANSWERS_FILE = "answers.safetensors"
HALF_KL_NATS, HALF_LOSS_NATS = 0.002, 0.01
LARGEST_WEIGHT_ERROR = 1 / 128
DECODE_TOKENS, RANGE_TOKENS, PROMPT_TOKENS = 24, 32, 8
NOISE_SEEDS = (1, 2)
WHERE = "on ONNX Runtime's CPU provider, not on the device"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One target: how its package is opened here, what its form breaches, given the manifest's details, and whether
    onnxruntime-genai runs the folder."""

    session: Callable[..., Session]
    breaches: Callable[[GraphFile, Mapping[str, Any]], list[str]]
    genai: bool


DEVICES: dict[str, Device] = {
    "cuda": Device(
        session=OrtSession, breaches=lambda file, details: cuda_breaches(file, details["nodes"]), genai=True
    ),
    "tensorrt": Device(
        session=TensorRtSession,
        breaches=lambda file, details: tensorrt_breaches(file, details["tensorrt"]["forms"]),
        genai=False,
    ),
}


def verify_device_export(
    folder: Path,
    source: WeightSource,
    details: Mapping[str, Any],
    tokens: IntArray,
    *,
    progress: Progress,
    threads: int | None = None,
) -> Verification:
    """Verify a package that was just written, and store its answers.

    Args:
        folder: in its staging folder; no manifest needed.
        source: what it was made from.
        details: what the manifest will say of it.
        tokens: ids [B, T].
        progress: (done, total, text).
        threads: of the runtime and of scoring.
    """
    checks = _static(folder, details)
    if isinstance(source, QuantizedCheckpoint) and source.schemes:
        error = largest_weight_error(GraphFile(model_path(folder)), details["nodes"], source)
        checks.append(
            Check(
                name="weights",
                numbers={"error": error},
                limits={"error": LARGEST_WEIGHT_ERROR},
                detail="against the checkpoint, over the largest weight of a row",
            )
        )
    checks.append(_range(folder, tokens, threads))
    if checks[-1].outcome == "fail":
        return Verification(checks=tuple(checks))
    with _open(folder, details, tokens, threads) as session, ReferenceSession(source) as reference:
        noisy = [reference.perturbed(seed) for seed in NOISE_SEEDS]
        result, *runs = evaluate_together(
            [session, *noisy], tokens, reference=reference, threads=threads, progress=progress
        )
        few = min(DECODE_TOKENS, tokens.shape[1])
        floor = NoiseFloor.of(runs, sequences=len(tokens), positions=tokens.shape[1] - 1)
        few_floor = NoiseFloor.of(runs, sequences=1, positions=few - 1)
        assert result.reference_losses is not None
        distance = Distance.between(result.losses, result.reference_losses, result.kl)
        checks.append(_model(distance, floor, float(result.top1_agreement or 0.0)))
        floors = np.maximum(floor.to_array(), few_floor.to_array())
        checks.append(_decode(session, tokens, NoiseFloor.from_array(floors), threads, progress))
        checks += _genai(folder, details, tokens, session.vocab_size)
    write_file(folder / ANSWERS_FILE, save({"tokens": tokens, "losses": result.losses, "floor": floors}))
    return Verification(checks=tuple(checks))


def verify_device_package(folder: Path, *, progress: Progress, threads: int | None = None) -> Verification:
    """Verify a finished package without its checkpoint.

    Raises:
        InputRefused: when a byte changed, or it was exported without verification.
    """
    details = open_artifact(folder, kind="package").details
    tokens, losses, floor = _answers(folder)
    checks = [*_static(folder, details), _range(folder, tokens, threads)]
    with _open(folder, details, tokens, threads) as session:
        result = evaluate(session, tokens, threads=threads, progress=progress)
        change = Distance.between(result.losses, losses, None).loss_rms
        checks.append(
            Check(
                name="answers",
                numbers={"loss_rms": change},
                limits={"loss_rms": FACTOR * floor.loss_rms + HALF_LOSS_NATS},
                detail=f"against the losses stored at export, {WHERE}",
            )
        )
        checks.append(_decode(session, tokens, floor, threads, progress))
        checks += _genai(folder, details, tokens, session.vocab_size)
    return Verification(checks=tuple(checks))


def _static(folder: Path, details: Mapping[str, Any]) -> list[Check]:
    path = model_path(folder)
    found = {
        "checker": checker_breaches(path),
        "form": DEVICES[details["target"]].breaches(GraphFile(path), details),
    }
    return [
        Check(
            name=name,
            numbers={"breaches": float(len(breaches))},
            limits={"breaches": 0.0},
            detail=breaches[0] if breaches else path.name,
        )
        for name, breaches in found.items()
    ]


def _range(folder: Path, tokens: IntArray, threads: int | None) -> Check:
    largest, where = largest_value(model_path(folder), tokens[:1, :RANGE_TOKENS], threads=threads)
    return Check(
        name="range",
        numbers={"largest": largest},
        limits={"largest": LARGEST_HALF},
        detail=f"largest of the float16 tensors: {where}",
    )


def _open(folder: Path, details: Mapping[str, Any], tokens: IntArray, threads: int | None) -> Session:
    return DEVICES[details["target"]].session(folder, threads=threads, max_length=tokens.shape[1])


def _model(distance: Distance, floor: NoiseFloor, agreement: float) -> Check:
    numbers = {"kl_nats": distance.kl_nats, "loss_mean": distance.loss_mean, "top1_agreement": agreement}
    limits = {
        "kl_nats": FACTOR * floor.kl_nats + HALF_KL_NATS,
        "loss_mean": FACTOR * (floor.loss_mean + floor.loss_error) + HALF_LOSS_NATS,
    }
    return Check(name="model", numbers={**numbers, "floor_kl_nats": floor.kl_nats}, limits=limits, detail=WHERE)


def _decode(
    session: Session, tokens: IntArray, floor: NoiseFloor, threads: int | None, progress: Progress
) -> Check:
    few = tokens[:1, :DECODE_TOKENS]
    result = evaluate(session, few, reference=session, by_decode=True, threads=threads, progress=progress)
    assert result.kl_nats is not None
    numbers = {"kl_nats": result.kl_nats, "top1_agreement": float(result.top1_agreement or 0.0)}
    limits = {"kl_nats": FACTOR * floor.kl_nats + HALF_KL_NATS}
    return Check(name="decode", numbers=numbers, limits=limits, detail=f"against prefill, {WHERE}")


def _genai(folder: Path, details: Mapping[str, Any], tokens: IntArray, vocab_size: int) -> list[Check]:
    if not DEVICES[details["target"]].genai:
        return []
    answer = genai_generates(folder, [int(i) for i in tokens[0, :PROMPT_TOKENS]], vocab_size, on_cpu=True)
    known: dict[str, Literal["pass", "skipped"]] = {NOT_INSTALLED: "skipped", "pass": "pass"}
    detail = f"{answer}, its CPU provider in place of the named one"
    return [Check(name="genai", detail=detail, forced=known.get(answer, "fail"))]


def _answers(folder: Path) -> tuple[IntArray, FloatArray, NoiseFloor]:
    path = folder / ANSWERS_FILE
    try:
        stored = load(path.read_bytes())
        return stored["tokens"], stored["losses"], NoiseFloor.from_array(stored["floor"])
    except FileNotFoundError:
        why = "holds no answers: it was exported with --no-verify"
        raise InputRefused(folder, why, "export it again without --no-verify") from None
    except (SafetensorError, KeyError, ValueError):
        raise InputRefused(path, "is damaged", "export the package again") from None
