"""The whole model through our Triton kernels, interpreted, and the step that a CUDA graph records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.runtime.native import NativeSession
from qtool.runtime.native.model import NativeModel
from qtool.runtime.native.step import Step


def test_the_kernels_compute_what_their_references_do(
    make_source: Callable[..., Any],
    quantize_blocks: Callable[..., Any],
    round_nearest: Callable[..., Any],
    tokens: np.ndarray,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the residual stream to the cache: norms, codes, products, attention; only the float head is torch's."""
    pytest.importorskip("triton")
    source = make_source("qwen3", num_hidden_layers=1)
    scheme = layer_scheme("W4A8", activation="per_token", group_size="channel")
    checkpoint = quantize_blocks(source, tmp_path / "c", scheme, lambda _, weight, s: round_nearest(weight, s))
    checkpoint.manifest.details["kv"] = CacheScheme.model_validate({"format": "int8"}).model_dump()
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("QTOOL_BACKEND", backend)
        with NativeSession(checkpoint, max_length=16) as session:
            assert (backend == "triton") == ("Triton kernels" in session.description)
            found.append([session.prefill(tokens[:2, :3], [3, 2])[[0, 0, 0, 1, 1], [0, 1, 2, 0, 1]]])
            found[-1].append(session.decode(tokens[:2, 3]))
    for reference, triton in zip(*found, strict=True):
        np.testing.assert_allclose(triton, reference, rtol=0, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("kv", [None, {"format": "int4", "rotate": True}])
def test_a_recorded_step_is_an_ordinary_one(
    make_checkpoint: Callable[..., Any], tokens: np.ndarray, kv: dict[str, Any] | None
) -> None:
    """What a graph replays knows its positions from a tensor alone, and may run again on the same tokens."""
    checkpoint = make_checkpoint("W4A8", group_size=32, activation="per_token")
    if kv is not None:
        checkpoint.manifest.details["kv"] = CacheScheme.model_validate(kv).model_dump()
    cpu = torch.device("cpu")
    model = NativeModel(checkpoint, cpu, torch.float32, 16)
    lengths = [9, 4, 6]
    prompts = torch.cat([torch.from_numpy(row[:n]) for row, n in zip(tokens, lengths, strict=True)])
    ids, first = torch.tensor([5, 6, 7]), torch.tensor(lengths, dtype=torch.int32)
    found = []
    with torch.inference_mode():
        for step in (Step.of(lengths, [1, 1, 1], cpu), Step.recorded(first)):
            caches = model.caches(3)
            model.logits(prompts, Step.of([0, 0, 0], lengths, cpu), caches)
            found += [model.logits(ids, step, caches), model.logits(ids, step, caches)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))
