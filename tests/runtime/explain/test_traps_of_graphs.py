"""Traps of whole graphs: decoders written by hand, with one thing wrong each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx import helper as h

from qtool.runtime.explain import Explanation, Settings, explain

V, D = 24, 16
Save = Callable[[Any], Path]


def decoder(graphs: Any, *, cache: bool = True, chosen: bool = False, table: str = "FLOAT") -> Any:
    """ids → embedding → one product → (chosen tokens) → logits; beside it a cache that grows by Concat."""
    normal = np.random.default_rng(0).standard_normal
    stored = [
        graphs.tensor("model.layers.0.mlp.up_proj.weight", normal((D, D)), "FLOAT"),
        graphs.tensor("lm_head.weight", normal((D, V)), "FLOAT"),
        graphs.tensor("new", np.zeros((1, 2, 1, 8)), "FLOAT"),
    ]
    inputs = [h.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])]
    outputs = [h.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t" if chosen else "s", V])]
    nodes = [
        h.make_node("Gather", ["table", "input_ids"], ["embedded"], "/model/embed_tokens/Gather"),
        h.make_node("MatMul", ["embedded", "model.layers.0.mlp.up_proj.weight"], ["hidden"], "node_linear"),
    ]
    if table == "FLOAT":
        stored.append(graphs.tensor("table", normal((V, D)), "FLOAT"))
    else:
        stored += [graphs.tensor("codes", np.zeros((V, D)), table), graphs.tensor("scale", 0.1, "FLOAT")]
        nodes.insert(0, h.make_node("DequantizeLinear", ["codes", "scale"], ["table"], "table_dq"))
    if cache:
        inputs.append(h.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, [1, 2, "p", 8]))
        outputs.append(h.make_tensor_value_info("present.0.key", TensorProto.FLOAT, [1, 2, "q", 8]))
        nodes.append(
            h.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], "/cache/Concat", axis=2)
        )
    head_input = "hidden"
    if chosen:
        inputs.append(h.make_tensor_value_info("rows", TensorProto.INT64, ["t"]))
        nodes.append(h.make_node("Gather", ["hidden", "rows"], ["picked"], "pick", axis=1))
        head_input = "picked"
    nodes.append(h.make_node("MatMul", [head_input, "lm_head.weight"], ["logits"], "/lm_head/MatMul"))
    graph = h.make_graph(nodes, "g", inputs, outputs, stored)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


def codes(found: Explanation) -> dict[str, tuple[str, ...]]:
    return {trap.code: trap.where for trap in found.warnings}


def test_a_cache_that_is_copied_and_a_head_for_all_tokens(graphs: Any, saved: Save) -> None:
    found = explain(saved(decoder(graphs)))
    assert codes(found) == {"cache-not-in-place": ("/cache/Concat",), "all-logits": ("lm_head",)}
    assert [linear.name for linear in found.linears] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert found.cache_bytes == 2 * 8 * 4 * found.length


def test_picking_tokens_before_the_head_is_no_trap(graphs: Any, saved: Save) -> None:
    found = explain(saved(decoder(graphs, chosen=True)))
    assert "all-logits" not in codes(found)
    assert found.linears[1].prefill_us == found.linears[1].decode_us
    assert found.linears[0].prefill_us > found.linears[0].decode_us


def test_no_cache_at_all(graphs: Any, saved: Save) -> None:
    assert "no-cache" in codes(explain(saved(decoder(graphs, cache=False))))


def test_an_embedding_dequantized_whole(graphs: Any, saved: Save) -> None:
    found = codes(explain(saved(decoder(graphs, table="INT8")), Settings(level="basic")))
    assert found["embedding-dequantized"] == ("/model/embed_tokens/Gather",)


@pytest.mark.parametrize(("level", "warned"), [("none", True), ("all", False)])
def test_a_weight_transposed_at_every_call(level: str, warned: bool, graphs: Any, saved: Save) -> None:
    turn = h.make_node("Transpose", ["stored"], ["w"], "turn", perm=[1, 0])
    weight = graphs.tensor("stored", np.ones((96, 128)), "FLOAT")
    path = saved(graphs.model(graphs.together(([turn], [weight]), graphs.product())))
    found = explain(path, Settings(level=level))
    assert ("weights-converted" in codes(found)) is warned
    assert (found.linears[0].k, found.linears[0].n) == (128, 96)
    assert found.linears[0].kernel.startswith("Transpose of the weight" if warned else "MatMul float32")


def test_warnings_come_before_notes_and_say_where(graphs: Any, saved: Save) -> None:
    parts = graphs.together(
        graphs.dequantized("INT4", block=32), graphs.rounded("UINT16"), graphs.product("xq"),
    )
    found = explain(saved(graphs.model(parts)))
    assert [trap.warning for trap in found.traps] == [True, True]
    assert all("(model.layers.0.mlp.up_proj)" in trap.line() for trap in found.traps)


def test_linears_without_names_are_told_apart(graphs: Any, saved: Save) -> None:
    """Two products of the same name, one unfused: each is followed to its own kernel."""
    first = graphs.together(graphs.dequantized("INT4", block=32), graphs.product("x", "y0"))
    square = np.ones((96, 96))
    second = h.make_node("MatMul", ["y0", "v"], ["y"], "")
    first[0][1].name = ""
    path = saved(graphs.model(graphs.together(first, ([second], [graphs.tensor("v", square, "FLOAT")]))))
    kernels = {linear.name: linear.kernel for linear in explain(path).linears}
    assert kernels == {"w_codes": "MatMulNBits level 4, 4 bits, block 32", "v": "MatMul float32"}


def test_a_graph_deeper_than_pythons_stack_is_explained(graphs: Any, saved: Save) -> None:
    chain = [h.make_node("Relu", [f"x{i}" if i else "x"], [f"x{i + 1}"], f"relu{i}") for i in range(3000)]
    square = h.make_node("MatMul", ["x3000", "w"], ["y"], "/model/layers.0/mlp/up_proj/MatMul")
    turned = h.make_node("Gemm", ["y", "x3000"], ["z"], "attention", transA=1)
    weight = graphs.tensor("w", np.ones((128, 96)), "FLOAT")
    path = saved(graphs.model(([*chain, square, turned], [weight])))
    (linear,) = explain(path, Settings(level="none")).linears
    assert linear.kernel == "MatMul float32"


def test_a_matrix_stored_the_other_way_round_does_not_fuse(graphs: Any, saved: Save) -> None:
    """[out, in] and a Transpose behind the DequantizeLinear, as a checkpoint has it."""
    stored = [graphs.tensor("codes", np.zeros((96, 128)), "INT4"), graphs.tensor("s", np.ones((96, 4)), "FLOAT")]
    nodes = [
        h.make_node("DequantizeLinear", ["codes", "s"], ["wide"], "dq", axis=1, block_size=32),
        h.make_node("Transpose", ["wide"], ["w"], "turn", perm=[1, 0]),
    ]
    found = explain(saved(graphs.model(graphs.together((nodes, stored), graphs.product()))))
    (linear,) = found.linears
    if linear.compute == "float":  # a runtime that learns to fuse it is welcome
        assert linear.kernel.startswith("DequantizeLinear at every call")
        (trap,) = found.warnings
        assert "store the matrix as [in, out]" in trap.remedy
    assert (linear.k, linear.n) == (128, 96)
