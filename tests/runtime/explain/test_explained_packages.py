"""Packages that qtool wrote, and the same with a fault planted."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper as h
from onnx import numpy_helper

from qtool.runtime.explain import Explanation, explain, measure, model_files, node_times


@pytest.fixture(scope="module")
def package(
    make_checkpoint: Callable[..., Any],
    export_to: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """A tiny W4A8 package and the manifest's details."""
    folder = tmp_path_factory.mktemp("explained") / "package"
    scheme = {"group_size": 32, "activation": "per_token_group"}
    return folder, export_to(make_checkpoint("W4A8", **scheme), folder)


@pytest.fixture(scope="module")
def explained(package: tuple[Path, dict[str, Any]]) -> Explanation:
    (file,) = model_files(package[0])
    return explain(file.path, file.settings, length=64)


def test_every_lowered_node_runs_as_it_was_lowered(
    package: tuple[Path, dict[str, Any]], explained: Explanation
) -> None:
    lowered = {name: node for name, node in package[1]["nodes"].items() if node["op"] == "MatMulNBits"}
    assert {linear.node for linear in explained.linears} == set(lowered)
    for linear in explained.linears:
        node = lowered[linear.node]
        numbers = "level {accuracy_level}, {bits} bits, block {block_size}".format(**node)
        assert linear.kernel == f"MatMulNBits {numbers}"
        assert (linear.compute, linear.n) == ("integer", sum(node["rows"]))
        assert linear.name.rpartition(".")[0] == node["modules"][0].rpartition(".")[0]


def test_bytes_are_those_of_the_file(package: tuple[Path, dict[str, Any]], explained: Explanation) -> None:
    graph = onnx.load(str(package[0] / "model.onnx")).graph
    sizes = {tensor.name: numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer}
    for linear in explained.linears:
        node = next(node for node in graph.node if node.name == linear.node)
        assert linear.weight_bytes == sum(sizes[name] for name in node.input[1:] if name)
    assert explained.weight_bytes == sum(linear.weight_bytes for linear in explained.linears)
    assert explained.cache_bytes == 64 * 2 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, width, float32


def test_shares_add_up_and_roles_repeat_over_the_layers(explained: Explanation) -> None:
    assert sum(x.decode_share for x in (*explained.linears, *explained.parts)) == pytest.approx(1)
    assert sum(x.prefill_share for x in (*explained.linears, *explained.parts)) == pytest.approx(1)
    roles = Counter(linear.role for linear in explained.linears)
    assert roles["model.layers.*.mlp.down_proj"] == 2
    assert roles["lm_head"] == 1
    assert {part.name: part.nodes for part in explained.parts}["attention"] == 2


def test_a_good_package_is_in_no_trap_but_the_logits(explained: Explanation) -> None:
    assert [trap.code for trap in explained.traps] == ["all-logits"]


def test_a_planted_unfused_linear_is_found(
    package: tuple[Path, dict[str, Any]], explained: Explanation, tmp_path: Path
) -> None:
    """One layer's down_proj with 16-bit Q-DQ activations and int8 weights, in a package that is good otherwise."""
    folder = tmp_path / "planted"
    shutil.copytree(package[0], folder)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    place = next(i for i, node in enumerate(model.graph.node) if "layers.1/mlp/down_proj" in node.name)
    good = model.graph.node[place]
    numbers = {attribute.name: attribute.i for attribute in good.attribute}
    weight = np.ones((numbers["K"], numbers["N"]), np.int8)
    for name, array in (
        ("bad_codes", weight),
        ("bad_scale", np.float32(0.01)),
        ("x_scale", np.float32(0.02)),
        ("x_zero", np.uint16(32768)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    bad = [
        h.make_node("QuantizeLinear", [good.input[0], "x_scale", "x_zero"], ["x_codes"], "bad_q"),
        h.make_node("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], ["x_again"], "bad_dq"),
        h.make_node("DequantizeLinear", ["bad_codes", "bad_scale"], ["bad_weight"], "bad_weight_dq"),
        h.make_node("MatMul", ["x_again", "bad_weight"], list(good.output), "/model/layers.1/mlp/down_proj/MatMul"),
    ]
    model.graph.node.remove(good)
    for offset, node in enumerate(bad):
        model.graph.node.insert(place + offset, node)
    (folder / "model.onnx").write_bytes(model.SerializeToString())

    found = explain(folder / "model.onnx", length=64)
    where = {trap.code: trap.where for trap in found.warnings}
    planted = "model.layers.1.mlp.down_proj"
    assert where["weights-dequantized"] == where["16-bit-activations"] == (planted,)
    before = {linear.name: linear for linear in explained.linears}
    for linear in found.linears:
        assert (linear.kernel == before[linear.name].kernel) is (linear.name != planted)
    bad_one = next(linear for linear in found.linears if linear.name == planted)
    assert bad_one.decode_us > 2 * before[planted].decode_us


def test_float_activations_and_float_weights_are_called_so(
    float_package: Path,
    make_checkpoint: Callable[..., Any],
    export_to: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    plain = explain(float_package / "model.onnx")
    assert {linear.kernel for linear in plain.linears} <= {"MatMul float32", "FusedMatMul float32", "Gemm float32"}
    assert {linear.compute for linear in plain.linears} == {"float"}
    assert "model.layers.0.self_attn.o_proj" in {linear.name for linear in plain.linears}
    weight_only = tmp_path / "weight-only"
    export_to(make_checkpoint("W4A16", group_size=32), weight_only)
    kernels = {linear.kernel for linear in explain(weight_only / "model.onnx").linears}
    assert kernels == {"MatMulNBits level 1, 4 bits, block 32"}


@pytest.mark.parametrize("kind", ["W4A8", "float"])
def test_a_profile_counts_the_nodes_that_were_explained(
    kind: str, package: tuple[Path, dict[str, Any]], float_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    run_child = node_times.run_child
    monkeypatch.setattr(node_times, "run_child", lambda *given: (asked.append(given[-1]), run_child(*given))[1])
    (file,) = model_files(package[0] if kind == "W4A8" else float_package)
    explanation = explain(file.path, length=32)
    measured = measure(file, explanation, steps=2, threads=1)
    assert sum(row[1] for row in measured.rows.values()) == pytest.approx(1)
    assert sum(row[2] for row in measured.rows.values()) == pytest.approx(1)
    operator = "MatMulNBits" if kind == "W4A8" else "MatMul"
    assert measured.rows[f"{operator} model.layers.*.mlp.down_proj"][0] == 2
    assert measured.rows["GroupQueryAttention"][0] == 2
    assert [given["in_place"] for given in asked] == [True]
    assert measured.decode_ms > 0
    assert measured.prefill_ms > 0
    assert replace(explanation, measured=measured).to_json()["measured"]["steps"] == 2


def test_both_graphs_of_a_hybrid_package_are_explained(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    from qtool.quantize.export.onnx.package import export_package

    folder = tmp_path / "hybrid"
    folder.mkdir()
    checkpoint = make_checkpoint("W4A8", group_size=32, activation="per_token_group")
    nothing: dict[str, Any] = {"tokenizer_files": {}, "recipe_yaml": None, "progress": lambda *_: None}
    export_package(checkpoint, folder, last_logits=True, prefill="w8a8", **nothing)
    decode, prefill = (explain(file.path, file.settings) for file in model_files(folder))
    assert decode.warnings == ()
    head = next(linear for linear in decode.linears if linear.name == "lm_head")
    assert head.prefill_us == head.decode_us
    assert {linear.compute for linear in (*decode.linears, *prefill.linears)} == {"integer"}
    down = next(linear for linear in prefill.linears if linear.name == "model.layers.0.mlp.down_proj")
    assert down.kernel == "MatMulIntegerToFloat"
    assert down.activations == "uint8 per token (rows divided by their maxima)"
