"""`from_pretrained` and timing on a real GPU: TRITON_INTERPRET=0 python -m pytest tests/runtime/pretrained -k on_gpu"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.cli.main import main
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.runtime.native import NativeSession
from qtool.runtime.throughput import measure_together

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton"),
]
ROUNDING = 0.05  # root mean square of the logits': bfloat16, and codes that tip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    model = write_model(root / "model", "llama", tied=True, hidden_size=256, intermediate_size=512)
    scheme = ("--scheme", "W4A8", "--activation", "per_token", "--kv", "int8", "--quantizer", "rtn")
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(model), "-o", str(root / "checkpoint"), *scheme])
    assert not stop.value.code
    return root / "checkpoint"


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


def test_the_model_on_gpu_says_what_the_session_says_and_replays_a_graph(folder: Path, tokens: np.ndarray) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    assert model.device.type == "cuda"
    with NativeSession(QuantizedCheckpoint(folder), device="cuda", max_length=64) as session:
        wanted = [session.prefill(tokens[:, :8])] + [session.decode(tokens[:, at])[:, None] for at in range(8, 16)]
    ids = torch.from_numpy(tokens).cuda()
    out = model(ids[:, :8])
    found = [out.logits]
    for at in range(8, 16):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values)
        found.append(out.logits)
    got = torch.cat(found, dim=1).float().cpu().numpy()
    assert off(got, np.concatenate(wanted, axis=1)) < ROUNDING
    graph = out.past_key_values._memory.graph
    assert graph is not None and graph.recorded
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, pad_token_id=256).shape[0] == 3


def test_timing_on_gpu_is_by_its_events(folder: Path) -> None:
    with NativeSession(QuantizedCheckpoint(folder), device="cuda", max_length=32) as session:
        (found,) = measure_together([session], prompt_tokens=16, decode_tokens=8, batch=2, rounds=3)
    assert found.rounds == 3 and found.decode_tokens_per_s.low > 0
