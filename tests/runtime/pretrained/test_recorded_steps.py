"""Decoding by a recorded step, as a GPU does it; here the recording is a stand-in that runs the step again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.runtime.native import NativeSession
from qtool.runtime.native.step import Step
from qtool.runtime.pretrained import decoder
from qtool.runtime.pretrained.decoder import Loaded, NativeDecoder


class Replayed:
    """A graph without a GPU: it computes from the same two tensors, positions on the device."""

    made = 0
    refuses = False

    def __init__(self, compute: Callable[[Tensor, Step], Tensor], batch: int, device: torch.device) -> None:
        Replayed.made += 1
        self._compute, self.batch = compute, batch
        self.recorded = not Replayed.refuses

    def __call__(self, ids: Tensor, first: Tensor) -> Tensor:
        if Replayed.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        assert ids.shape == first.shape == (self.batch,)
        return self._compute(ids, Step.recorded(first))


@pytest.fixture
def network(make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> NativeDecoder:
    monkeypatch.setattr(decoder, "DecodeGraph", Replayed)
    monkeypatch.setattr(Replayed, "made", 0)
    loaded = Loaded(make_checkpoint("W4A8", group_size=32, activation="per_token"), 64)
    loaded.place(torch.device("cpu"), torch.float32)
    assert not loaded.graphs, "there is nothing to record on a CPU"
    config = type("Config", (), {"use_cache": True})()
    return NativeDecoder(loaded, config)


def steps(network: NativeDecoder, tokens: np.ndarray) -> list[Tensor]:
    """A padded prompt of three sequences, and four tokens behind it."""
    ids = torch.from_numpy(tokens)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5] = 0
    found = [network(ids[:, :8], attention_mask=mask[:, :8])]
    for at in range(8, 12):
        found.append(
            network(
                ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=found[-1].past_key_values
            )
        )
    return [step.last_hidden_state for step in found]


def test_recorded_steps_compute_what_others_do(network: NativeDecoder, tokens: np.ndarray) -> None:
    wanted = steps(network, tokens)
    network._loaded.graphs = True
    found = steps(network, tokens)
    assert Replayed.made == 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    again = steps(network, tokens)
    assert Replayed.made == 1, "the memory of the text before it, and its recording, are there to be used"
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


def test_what_cannot_be_recorded_runs_step_by_step(
    network: NativeDecoder, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = steps(network, tokens)
    network._loaded.graphs = True
    monkeypatch.setattr(Replayed, "refuses", True)
    with caplog.at_level(logging.WARNING, "qtool.runtime"):
        found = steps(network, tokens)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert [record.message for record in caplog.records] == [
        "decoding without CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert Replayed.made == 1


def test_linears_without_a_kernel_are_a_warning_however_they_are_loaded(
    make_checkpoint: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = make_checkpoint("W8A8", symmetric=False)
    with caplog.at_level(logging.WARNING, "qtool.runtime"):
        NativeSession(checkpoint, max_length=8).close()
        Loaded(checkpoint, 8).place(torch.device("cpu"), torch.float32)
    warning = "9 linears run dequantized in float32: no kernel for 8-bit weights with zero points"
    assert [record.message for record in caplog.records] == [warning] * 2
