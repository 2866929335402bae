"""Whole packages of checkpoints with online transforms and side products: what they compute, count and describe."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.planner.cost import LOW_RANK_NODES
from qtool.runtime.reference import ReferenceSession

W4A16 = layer_scheme("W4A16", group_size=32)
W4A8 = layer_scheme("W4A8", group_size=32)
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
RANK = 8


def blocks(scheme):
    return lambda module: None if module == "lm_head" else scheme


@pytest.fixture
def around(transform_of):
    """around(kind, rank): every input of the blocks behind one transform, its linears corrected by this rank."""

    def make(kind, rank=0):
        def of(module, columns):
            parent, _, leaf = module.rpartition(".")
            transform = None if kind is None or module == "lm_head" else transform_of(kind, columns)
            site = f"{parent}.{FIRST.get(leaf, leaf)}.input.{kind}"
            return {"site": site, "transform": transform, "rank": 0 if module == "lm_head" else rank}

        return of

    return make


def logits(checkpoint, ids):
    with ReferenceSession(checkpoint) as session:
        return session.prefill(ids)


def relative(got, wanted):
    return float((np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max())


def computed_nodes(graph):
    """How many nodes read the graph's inputs, directly or not; the session computes the others once, when it loads."""
    live, count = {value.name for value in graph.input}, 0
    for node in graph.node:
        if live & set(node.input):
            live |= set(node.output)
            count += 1
    return count


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["hadamard", "quad", "divide", "quad, then divide"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_package_computes_the_checkpoint(
    family, kind, rank, tiny_model, source_of, quantize, export, run_logits, around, ids
):
    source = source_of(tiny_model(family))
    checkpoint = quantize(source, blocks(W4A16), around=around(kind, rank))
    folder, details = export(checkpoint, source)
    assert relative(run_logits(folder, ids), logits(checkpoint, ids)) <= 1e-5
    onnx.checker.check_model(str(folder / "model.onnx"))
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} <= {"", "com.microsoft"}
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    made = {name for node in graph.node for name in node.output}
    for node in details["nodes"].values():
        assert {node["online"][value] for value in ("input", "main", "product", "output")} <= made
    sites = {node["online"]["site"] for node in details["nodes"].values()}
    assert len(sites) == 2 * 4  # a layer: q and k and v, o, gate and up, down


@pytest.mark.parametrize(
    ("kind", "rank"), [("hadamard", 0), ("quad", 0), ("divide", 0), ("quad, then divide", 0), (None, 4), ("quad", 4)]
)
def test_the_planner_counts_the_nodes_that_are_added(
    kind, rank, tiny_model, source_of, quantize, export, around, transform_of
):
    source = source_of(tiny_model("llama"))
    counts = []
    for each in (around(None), around(kind, rank)):
        folder, _ = export(quantize(source, blocks(W4A16), around=each), source)
        counts.append(computed_nodes(onnx.load(folder / "model.onnx", load_external_data=False).graph))
    sites = 2 * 4  # a layer: q and k and v, o, gate and up, down
    counted = 0 if kind is None else transform_of(kind, 64).online_nodes
    assert counts[1] - counts[0] == sites * (counted + LOW_RANK_NODES * (rank > 0))


def test_a_quantized_head_stays_beside_transformed_blocks(
    tiny_model, source_of, quantize, export, run_logits, around, ids
):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, W4A16, around=around("quad"))
    folder, details = export(checkpoint, source)
    assert relative(run_logits(folder, ids), logits(checkpoint, ids)) <= 1e-5
    assert "online" not in details["nodes"]["/lm_head/MatMulNBits"]
    strange = quantize(source, W4A16, around=lambda m, k: around("quad")(m.replace("lm_head", "head"), k))
    with pytest.raises(UsageError, match=r"lm_head.*embedding"):
        export(strange, source)


def test_linears_with_different_inputs_are_taken_apart(
    tiny_model, source_of, quantize, export, run_logits, around, ids
):
    source = source_of(tiny_model("qwen2"))
    plain, turned = around(None), around("hadamard")

    def mixed(module, columns):
        return (plain if module.endswith(("v_proj", "up_proj")) else turned)(module, columns)

    checkpoint = quantize(source, blocks(W4A16), around=mixed)
    folder, details = export(checkpoint, source)
    assert relative(run_logits(folder, ids), logits(checkpoint, ids)) <= 1e-5
    found = {name: node.get("online", {}).get("site") for name, node in details["nodes"].items()}
    layer = "/model/layers.0/self_attn"
    assert found[f"{layer}/q_proj/MatMulNBits"] == found[f"{layer}/k_proj/MatMulNBits"]
    assert found[f"{layer}/v_proj/MatMulNBits"] is None
    assert "/model/layers.0/mlp/gate_up_proj/MatMulNBits" not in found
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    turns = [n for n in graph.node if n.op_type == "MatMul" and "layers.0" in n.name and "/hadamard/" in n.name]
    assert len(turns) == 4


def test_bits_count_side_products_and_transforms(tiny_model, source_of, quantize, export, around):
    source = source_of(tiny_model("llama"))
    shapes = {m: source.read(source.weight_name(m)).shape for m in source.linears() if m != "lm_head"}
    weights = sum(n * k for n, k in shapes.values())
    sites = [k for m, (_, k) in shapes.items() if m.rpartition(".")[2] not in FIRST]
    _, details = export(quantize(source, blocks(W4A8), around=around("quad", rank=2)), source)
    side = 16 * (RANK + 2) * sum(n for n, _ in shapes.values())
    downs = 16 * 2 * sum(k for _, k in shapes.values())
    turns = sum((16 * RANK + 8) * k for k in sites)
    counted = details["bits_per_weight_quantized"] * weights - (4 + 32 / 32) * weights - side - downs - turns
    # What is left: one Hadamard matrix and shapes for the graph, pads of packed corrections.
    assert 0 <= counted <= 8 * (4 * (64 * 64 + 32 * 32) + 1024)


def test_details_say_what_is_around_a_node(tiny_model, source_of, quantize, export, around):
    source = source_of(tiny_model("llama"))
    folder, details = export(quantize(source, blocks(W4A8), around=around("quad", rank=2)), source)
    node = details["nodes"]["/model/layers.1/self_attn/qkv_proj/MatMulNBits"]
    names = {"input", "main", "product", "output"}
    assert {key: value for key, value in node["online"].items() if key not in names} == {
        "site": "model.layers.1.self_attn.q_proj.input.quad",
        "transform": {"kind": "quad", "block": 64},
        "side_width": RANK,
        "low_rank": [2, 2, 2],
    }
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    lowered = next(n for n in graph.node if n.name == "/model/layers.1/self_attn/qkv_proj/MatMulNBits")
    assert node["online"]["main"] == lowered.input[0] and node["online"]["product"] == lowered.output[0]
    attention = next(n for n in graph.node if n.name == "/model/layers.1/self_attn/GroupQueryAttention")
    assert node["online"]["output"] == attention.input[0]
    json.dumps(details)


def test_two_exports_with_transforms_have_the_same_bytes(tiny_model, source_of, quantize, export, around):
    source = source_of(tiny_model("llama"))
    checkpoint = quantize(source, blocks(W4A8), around=around("quad", rank=2))
    (first, a), (second, b) = (export(checkpoint, source) for _ in range(2))
    assert a == b
    for name in ("model.onnx", "model.onnx.data"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_genai_runs_online_transforms(tiny_model, source_of, quantize, export, around):
    genai = pytest.importorskip("onnxruntime_genai")
    source = source_of(tiny_model("llama"))
    folder, _ = export(quantize(source, blocks(W4A8), around=around("quad", rank=2)), source)
    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    parameters.set_search_options(max_length=24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([5, 6, 7])
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > 5
