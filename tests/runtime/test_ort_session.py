"""ONNX Runtime with the KV cache in place: whatever way the tokens come in, the same logits come out."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qtool.errors import InputRefused, UsageError
from qtool.runtime.ort import OrtSession
from qtool.runtime.ort import session as session_module


@pytest.fixture
def session(float_package: Path) -> OrtSession:
    return OrtSession(float_package, threads=1, max_length=64)


def test_decoding_in_place_equals_a_fresh_prefill(session: OrtSession, tokens: np.ndarray) -> None:
    row = tokens[:1]
    whole = session.prefill(row)[0]
    session.reset()
    steps = [session.prefill(row[:, :5])[0, -1]]
    steps += [session.decode(row[:, t])[0].copy() for t in range(5, row.shape[1])]
    np.testing.assert_allclose(np.stack(steps), whole[4:], rtol=0, atol=2e-4)


@pytest.mark.parametrize("chunks", [(20, 28), (1, 47), (47, 1), (16, 16, 16), (3, 1, 1, 30, 13)])
def test_prefill_in_chunks_equals_one_prefill(
    session: OrtSession, tokens: np.ndarray, chunks: tuple[int, ...]
) -> None:
    row = tokens[:1]
    whole = session.prefill(row)
    session.reset()
    edges = np.cumsum((0, *chunks))
    parts = [session.prefill(row[:, a:b]) for a, b in pairwise(edges)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=2e-4)


def test_reset_forgets_what_the_buffers_still_hold(session: OrtSession, tokens: np.ndarray) -> None:
    first = session.prefill(tokens[:1])
    session.reset()
    session.prefill(tokens[1:2])
    session.reset()
    assert np.array_equal(session.prefill(tokens[:1]), first)


def test_prefill_hands_out_its_own_array(session: OrtSession, tokens: np.ndarray) -> None:
    first = session.prefill(tokens[:1])
    kept = first.copy()
    session.prefill(tokens[1:2, :8])
    session.decode(tokens[2, :1])
    assert np.array_equal(first, kept)


def test_a_full_cache_is_refused_and_changes_nothing(session: OrtSession, tokens: np.ndarray) -> None:
    row = tokens[:1]
    session.prefill(row)
    with pytest.raises(UsageError, match="64"):
        session.prefill(row[:, :17])
    with_room = session.prefill(row[:, :16])
    session.reset()
    whole = session.prefill(np.concatenate([row, row[:, :16]], axis=1))
    np.testing.assert_allclose(with_room, whole[:, 48:], rtol=0, atol=2e-4)


def test_only_one_sequence_at_a_time(session: OrtSession, tokens: np.ndarray) -> None:
    with pytest.raises(UsageError, match="one sequence"):
        session.prefill(tokens)
    with pytest.raises(UsageError, match="one sequence"):
        session.decode(tokens[:, 0])
    with pytest.raises(UsageError, match="outside the vocabulary"):
        session.decode(np.array([-1]))


def test_max_length_is_bounded_by_the_context(float_package: Path) -> None:
    with OrtSession(float_package, threads=1) as session:
        assert session.max_length == 256
    with pytest.raises(UsageError, match="context is 256"):
        OrtSession(float_package, max_length=257)


def test_a_broken_model_is_refused(float_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(float_package, folder)
    (folder / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InputRefused, match="cannot load"):
        OrtSession(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(UsageError, match="does not exist"):
        OrtSession(folder)


@pytest.mark.parametrize("chunk", [7, 16, 48, 128])
def test_a_prompt_is_read_in_chunks(
    session: OrtSession, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    whole = session.prefill(tokens[:1])[0, -1]
    monkeypatch.setattr(session_module, "CHUNK", chunk)
    session.reset()
    np.testing.assert_allclose(session.prefill_last(tokens[:1])[0], whole, rtol=0, atol=2e-4)
    following = session.decode(tokens[1, :1]).copy()
    session.reset()
    again = session.prefill(np.concatenate([tokens[:1], tokens[1:2, :1]], axis=1))[0, -1]
    np.testing.assert_allclose(following[0], again, rtol=0, atol=2e-4)
