"""The native session: the reference's logits, prefill and decode alike, sequences that do not see one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qtool.errors import EnvironmentFault, UsageError
from qtool.runtime.native import NativeSession
from qtool.runtime.reference import ReferenceSession

# Relative, root mean square. One 8-bit code that rounds the other way in the first block moves all that follow; most
# rows have none. Four-bit codes are worth more; W4A16 rounds its activations to bfloat16.
TYPICAL = 1e-4
WORST = 3e-2
BFLOAT16 = 2e-2

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("W4A8", {"activation": "per_token", "group_size": 64}),
    ("W4A8", {"activation": "per_token", "group_size": "channel"}),
    ("W8A8", {}),
    ("W4A16", {"group_size": 32}),
    ("FP8_DYNAMIC", {}),
    ("W4A4", {"group_size": 32}),
    ("W4A8_FP", {"group_size": 32, "scale": "shift"}),
    ("W4A8", {"activation": "per_token", "group_size": 64, "scale": "integer"}),
]


def scheme_id(value: object) -> str:
    return " ".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def relative(ours: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each row of logits."""
    return np.linalg.norm(ours - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def both(checkpoint: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with ReferenceSession(checkpoint) as reference, NativeSession(checkpoint, max_length=64) as native:
        return native.prefill(tokens), reference.prefill(tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "options"), SCHEMES, ids=scheme_id)
def test_the_reference_s_logits(
    make_checkpoint: Callable[..., Any],
    make_small_float: Callable[..., Any],
    tokens: np.ndarray,
    family: str,
    name: str,
    options: dict[str, Any],
) -> None:
    make = make_small_float if name == "W4A8_FP" else make_checkpoint
    ours, wanted = both(make(name, family=family, tied=family != "qwen2", **options), tokens[:2, :24])
    error = relative(ours, wanted)
    assert np.sqrt((error**2).mean()) < (BFLOAT16 if name == "W4A16" else WORST)
    # The first rows have the fewest codes that could tip.
    assert name == "W4A16" or np.quantile(error, 0.25) < TYPICAL


@pytest.mark.parametrize("kind", ["hadamard", "quad", "hadamard then divide", "low rank"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("W4A8", {"activation": "per_token", "group_size": 32}), ("W4A4", {"group_size": 32, "runtime_smooth": "robust"})],
    ids=scheme_id,
)
def test_with_transforms(
    make_transformed: Callable[..., Any], tokens: np.ndarray, kind: str, name: str, options: dict[str, Any]
) -> None:
    ours, wanted = both(make_transformed(kind, name, family="qwen3", **options), tokens[:2, :24])
    assert np.sqrt((relative(ours, wanted) ** 2).mean()) < (0.1 if name == "W4A4" else WORST)


@pytest.mark.parametrize(("name", "options"), SCHEMES[:3], ids=scheme_id)
def test_decoding_continues_a_prefill_in_pieces(
    make_checkpoint: Callable[..., Any], tokens: np.ndarray, name: str, options: dict[str, Any]
) -> None:
    with NativeSession(make_checkpoint(name, **options), max_length=48) as session:
        whole = session.prefill(tokens)
        session.reset()
        parts = [session.prefill(tokens[:, :10]), session.prefill(tokens[:, 10:40])]
        parts += [session.decode(tokens[:, t])[:, None] for t in range(40, 48)]
    error = relative(np.concatenate(parts, axis=1), whole)
    assert np.quantile(error, 0.5) < 1e-5 and np.sqrt((error**2).mean()) < WORST


@pytest.mark.parametrize(("name", "options"), [*SCHEMES[:3], SCHEMES[5], SCHEMES[-1]], ids=scheme_id)
def test_a_sequence_has_the_same_bits_in_any_company(
    make_checkpoint: Callable[..., Any], tokens: np.ndarray, name: str, options: dict[str, Any]
) -> None:
    """Integer sums do not depend on what is beside them, and nothing else looks across sequences."""
    lengths = [31, 7, 20]
    with NativeSession(make_checkpoint(name, family="qwen3", **options), max_length=48) as session:
        together = session.prefill(tokens[:, :31], lengths)
        steps = [session.decode(tokens[:, 31 + t]) for t in range(3)]
        assert session.lengths == (34, 10, 23)
        assert not together[1, 7:].any()
        for row, length in enumerate(lengths):
            session.reset()
            np.testing.assert_array_equal(session.prefill(tokens[row : row + 1, :length])[0], together[row, :length])
            for t, step in enumerate(steps):
                np.testing.assert_array_equal(session.decode(tokens[row : row + 1, 31 + t])[0], step[row])


def test_smoothed_requests_of_a_batch_are_their_own(make_checkpoint: Callable[..., Any], tokens: np.ndarray) -> None:
    checkpoint = make_checkpoint("W4A4", group_size=32, runtime_smooth="robust")
    with NativeSession(checkpoint, max_length=48) as session:
        together = session.prefill(tokens[:, :20], [20, 5, 13])
        session.reset()
        np.testing.assert_array_equal(session.prefill(tokens[2:, :13])[0], together[2, :13])


def test_a_window_hides_what_is_far(
    make_source: Callable[..., Any], quantize_all: Callable[..., Any], tmp_path: Any, tokens: np.ndarray
) -> None:
    from qtool.quantize.artifacts.scheme import layer_scheme

    source = make_source("mistral", sliding_window=8)
    checkpoint = quantize_all(source, tmp_path / "checkpoint", layer_scheme("W8A8"))
    ours, wanted = both(checkpoint, tokens[:, :40])
    assert np.median(relative(ours, wanted)) < 1e-3
    with NativeSession(checkpoint, max_length=48) as session:
        session.prefill(tokens[:, :39])
        assert np.median(relative(session.decode(tokens[:, 39]), wanted[:, 39])) < 1e-2


def test_float_layers_and_fallbacks_run_beside_kernels(
    make_source: Callable[..., Any], quantize_mixed: Callable[..., Any], tokens: np.ndarray
) -> None:
    checkpoint = quantize_mixed(make_source("llama", tied=False))
    with ReferenceSession(checkpoint) as reference, NativeSession(checkpoint, max_length=64) as session:
        description = session.description
        error = relative(session.prefill(tokens), reference.prefill(tokens))
    assert np.sqrt((error**2).mean()) < WORST
    for words in ("cpu", "w8a8_gemm", "float", "2 dequantized: no kernel for 8-bit weights with zero points"):
        assert words in description, description


def test_a_float_model_runs_too(make_source: Callable[..., Any], tokens: np.ndarray) -> None:
    ours, wanted = both(make_source("qwen2", tied=False), tokens)
    assert relative(ours, wanted).max() < 1e-5


def test_inputs_are_quantized_once_and_weights_merged(make_checkpoint: Callable[..., Any]) -> None:
    with NativeSession(make_checkpoint("W8A8"), max_length=8) as session:
        assert session.description.endswith("float32, cache float: 9 w8a8_gemm")  # 4 a block, and the head


def test_refusals(make_checkpoint: Callable[..., Any], make_source: Callable[..., Any], tokens: np.ndarray) -> None:
    checkpoint = make_checkpoint("W8A8")
    with NativeSession(checkpoint, max_length=16) as session:
        with pytest.raises(UsageError, match="holds 16"):
            session.prefill(tokens)
        session.prefill(tokens[:, :8])
        with pytest.raises(UsageError, match="cache holds 3"):
            session.decode(tokens[0, :2])
        with pytest.raises(UsageError, match="lengths"):
            session.prefill(tokens[:, :4], [4, 0, 1])
        with pytest.raises(UsageError, match="vocabulary"):
            session.decode(tokens[:, 0] + 400)
    with pytest.raises(UsageError, match="gemma2"):
        NativeSession(make_source("gemma2"), max_length=16)
    with pytest.raises(UsageError, match="tpu"):
        NativeSession(checkpoint, device="tpu", max_length=16)
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentFault, match="no GPU"):
            NativeSession(checkpoint, device="cuda", max_length=16)
