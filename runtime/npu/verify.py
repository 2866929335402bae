"""Verification of an NPU package, when it is exported and later.

    rules     every rule of the execution provider, on both graphs
    model     the simulated package against the torch reference: what static activations cost, in nats a token
    decode    token by token against prefill in chunks
    answers   later: the simulated losses against those stored at export

The activations are quantized by the export itself, so `model` is a measurement with a generous limit, not an equality:
`qtool evaluate` and `qtool check` judge it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qtool.errors import InputRefused
from qtool.quantize.artifacts.static_graphs import DECODE_FILE, PREFILL_FILE
from qtool.quantize.artifacts.store import open_artifact, write_file
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.runtime.evaluate import Progress, evaluate
from qtool.runtime.npu.rules import check_file
from qtool.runtime.npu.session import NpuSession
from qtool.runtime.reference.model import ReferenceSession
from qtool.runtime.session import IntArray
from qtool.runtime.verify import Check, Verification

ANSWERS_FILE = "answers.safetensors"
LARGEST_INCREASE_NATS = 1.0  # beyond, the package is broken, not coarse
LARGEST_DECODE_KL_NATS = 0.02
# Another version of the runtime may add in another order, and 8-bit roundings then flip.
LARGEST_CHANGE_NATS = 0.01
DECODE_TOKENS = 24


def verify_npu_export(
    folder: Path, source: WeightSource, tokens: IntArray, *, progress: Progress, threads: int | None = None
) -> Verification:
    """Verify a package that was just written, and store its answers.

    Args:
        folder: in its staging folder; no manifest needed.
        source: what it was made from.
        tokens: ids [B, T], T at most the context.
        progress: (done, total, text).
        threads: of the runtime and of scoring.
    """
    with NpuSession(folder, threads=threads) as session, ReferenceSession(source) as reference:
        result = evaluate(session, tokens, reference=reference, threads=threads, progress=progress)
        assert result.reference_losses is not None and result.kl_nats is not None
        assert result.reference_perplexity is not None and result.top1_agreement is not None
        increase = float(result.losses.mean(dtype=np.float64) - result.reference_losses.mean(dtype=np.float64))
        numbers = {
            "loss_increase": increase,
            "kl_nats": result.kl_nats,
            "perplexity": result.perplexity,
            "reference_perplexity": result.reference_perplexity,
            "top1_agreement": result.top1_agreement,
        }
        limits = {"loss_increase": LARGEST_INCREASE_NATS}
        model = Check(name="model", numbers=numbers, limits=limits, detail="simulated, against the torch reference")
        decode = _decode(session, tokens, threads, progress)
    write_file(folder / ANSWERS_FILE, save({"tokens": tokens, "losses": result.losses}))
    return Verification(checks=(*_rules(folder), model, decode))


def verify_npu_package(folder: Path, *, progress: Progress, threads: int | None = None) -> Verification:
    """Verify a finished package without its checkpoint.

    Raises:
        InputRefused: when a byte changed, or it was exported without verification.
    """
    open_artifact(folder, kind="package")
    tokens, losses = _answers(folder)
    with NpuSession(folder, threads=threads) as session:
        result = evaluate(session, tokens, threads=threads, progress=progress)
        change = float(np.abs(result.losses - losses).mean())
        answers = Check(
            name="answers", numbers={"change": change}, limits={"change": LARGEST_CHANGE_NATS},
            detail="against the losses stored at export",
        )
        decode = _decode(session, tokens, threads, progress)
    return Verification(checks=(*_rules(folder), answers, decode))


def _rules(folder: Path) -> list[Check]:
    checks = []
    for name in (PREFILL_FILE, DECODE_FILE):
        breaches = check_file(folder / name)
        detail = breaches[0].line() if breaches else name
        numbers = {"breaches": float(len(breaches))}
        checks.append(Check(name="rules", numbers=numbers, limits={"breaches": 0.0}, detail=detail))
    return checks


def _decode(session: NpuSession, tokens: IntArray, threads: int | None, progress: Progress) -> Check:
    few = tokens[:1, :DECODE_TOKENS]
    result = evaluate(session, few, reference=session, by_decode=True, threads=threads, progress=progress)
    assert result.kl_nats is not None and result.top1_agreement is not None
    numbers = {"kl_nats": result.kl_nats, "top1_agreement": result.top1_agreement}
    return Check(name="decode", numbers=numbers, limits={"kl_nats": LARGEST_DECODE_KL_NATS}, detail="against prefill")


def _answers(folder: Path) -> tuple[IntArray, FloatArray]:
    path = folder / ANSWERS_FILE
    try:
        stored = load(path.read_bytes())
        return stored["tokens"], stored["losses"]
    except FileNotFoundError:
        why = "holds no answers: it was exported with --no-verify"
        raise InputRefused(folder, why, "export it again without --no-verify") from None
    except (SafetensorError, KeyError):
        raise InputRefused(path, "is damaged", "export the package again") from None
