"""The CUDA package in plain ONNX Runtime with the providers of its session.json: the CPU's here, CUDA's where there is
one. The same lines run in both places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qtool.quantize.export.onnx import export_package
from qtool.quantize.inputs import open_model
from qtool.runtime.reference.model import ReferenceSession

WANTED = ("CPUExecutionProvider", "CUDAExecutionProvider")


@pytest.mark.parametrize("provider", [name for name in WANTED if name in ort.get_available_providers()])
def test_logits_in_prefill_and_with_a_past(provider, write_model: Callable[..., Path], tmp_path):
    model = open_model(str(write_model(tmp_path / "model", "qwen2", intermediate_size=128)))
    folder = tmp_path / "package"
    folder.mkdir()
    export_package(
        model, folder, target="cuda", tokenizer_files={}, recipe_yaml=None, progress=lambda *_: None, last_logits=False
    )
    told = json.loads((folder / "session.json").read_text())
    named = [tuple(given) for given in told["providers"] if given[0] == provider]
    session = ort.InferenceSession(str(folder / told["model"]), providers=named)
    assert session.get_providers()[0] == provider
    ids = np.random.default_rng(0).integers(0, 256, (1, 20))
    names = [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    past = {name: np.zeros((1, 2, 0, 16), np.float16) for name in names}
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in past)]
    found, length = [], 0
    for part in (ids[:, :19], ids[:, 19:]):
        length += part.shape[1]
        mask = np.ones((1, length), np.int64)
        logits, *present = session.run(outputs, {"input_ids": part, "attention_mask": mask, **past})
        past = dict(zip(past, present, strict=True))
        found.append(logits)
    with ReferenceSession(model) as reference:
        expected = reference.prefill(ids)
    assert np.abs(np.concatenate(found, axis=1) - expected).max() < 0.02 * np.abs(expected).max()
