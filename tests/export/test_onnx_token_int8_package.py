"""Packages whose linears have one INT8 scale a token and a channel: they compute it, and verification proves it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from qtool.quantize.artifacts.scheme import layer_scheme

W8A8 = layer_scheme("W8A8")
W4A8 = layer_scheme("W4A8", group_size=32)


def mean_kl(wanted, got):
    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(wanted), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_package_computes_what_was_scored(
    family, tied, tiny_model, source_of, quantize, export, run_logits, torch_logits, ids
):
    source = source_of(tiny_model(family, tied=tied))
    checkpoint = quantize(source, W8A8)
    folder, details = export(checkpoint, source)
    got = run_logits(folder, ids)
    simulated, weight_only = torch_logits(checkpoint, ids, activations=True), torch_logits(checkpoint, ids)
    assert mean_kl(simulated, got) < 0.1 * mean_kl(simulated, weight_only)
    node = details["nodes"]["/model/layers.0/mlp/gate_up_proj/MatMulIntegerToFloat"]
    assert node == {
        "op": "MatMulIntegerToFloat",
        "modules": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
        "rows": [96, 96],
        "bits": 8,
        "block_size": 64,
    }
    counts = Counter(n.op_type for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)
    assert counts["MatMulIntegerToFloat"] == counts["QuantizeLinear"] == 2 * 4 + 1
    assert counts["GatherBlockQuantized"] == (1 if tied else 0)
    onnx.checker.check_model(str(folder / "model.onnx"))


def test_bits_count_codes_and_scales(tiny_model, source_of, quantize, export):
    source = source_of(tiny_model("llama"))
    _, details = export(quantize(source, lambda m: W8A8 if m.endswith("down_proj") else None), source)
    assert details["bits_per_weight_quantized"] == 8 + 32 / 96


def test_mixed_with_groups(tiny_model, source_of, quantize, export, run_logits, torch_logits, ids):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, lambda m: W4A8 if m.endswith(("down_proj", "lm_head", "k_proj")) else W8A8)
    folder, details = export(checkpoint, source)
    ops = Counter(node["op"] for node in details["nodes"].values())
    # q and v share their input's codes, not their node: k stands between them
    assert ops == {"MatMulIntegerToFloat": 2 * 4, "MatMulNBits": 2 * 2 + 1, "GatherBlockQuantized": 1}
    simulated, weight_only = torch_logits(checkpoint, ids, activations=True), torch_logits(checkpoint, ids)
    assert mean_kl(simulated, run_logits(folder, ids)) < 0.1 * mean_kl(simulated, weight_only)
