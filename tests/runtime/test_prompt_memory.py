"""`--prefill-memory`: which linears of a graph for prompts are INT8, what the package says of it, what verifies it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.int8_weights import Int8Weights
from qtool.quantize.export.onnx.fill_graph import cache_outputs
from qtool.quantize.export.onnx.front_end import build_float_graph
from qtool.quantize.export.onnx.package import export_package
from qtool.quantize.export.onnx.prompt_memory import PromptKind, choose_int8, memory_bytes, prompt_kinds
from qtool.runtime import verify as verify_module
from qtool.runtime.explain import explain, model_files
from qtool.runtime.ort import OrtSession
from qtool.runtime.reference.filled import FilledReference
from qtool.runtime.verify import verify_export

OPTIONS: dict[str, Any] = {"tokenizer_files": {}, "recipe_yaml": None, "progress": lambda *_: None}
MLP, DOWN, QKV, OUT = ("gate_proj", "up_proj"), ("down_proj",), ("q_proj", "k_proj", "v_proj"), ("o_proj",)
Made = tuple[Path, Any, dict[str, Any]]


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Any]) -> Any:
    return make_checkpoint("W4A8", family="llama", group_size=32)


def kinds_of(checkpoint: Any) -> list[PromptKind]:
    graph = build_float_graph(checkpoint.config).graph
    return prompt_kinds(graph, cache_outputs(graph), checkpoint.schemes.get)


def limit_for(checkpoint: Any, *leaves: tuple[str, ...]) -> int:
    kinds = kinds_of(checkpoint)
    return memory_bytes(kinds, [kind for kind in kinds if kind.leaves in leaves])


@pytest.fixture(scope="session")
def made(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The attention in INT8, the MLP as it is stored."""
    folder = tmp_path_factory.mktemp("limited") / "package"
    folder.mkdir()
    limit = limit_for(checkpoint, QKV, OUT)
    return folder, checkpoint, export_package(
        checkpoint, folder, last_logits=True, prefill="w8a8", prefill_memory=limit, **OPTIONS
    )


def test_kinds_are_what_the_cache_needs(checkpoint: Any) -> None:
    kinds = {kind.leaves: kind for kind in kinds_of(checkpoint)}
    shapes = checkpoint.shapes
    first = {m.rpartition(".")[2]: shapes[m] for m in shapes if m.startswith("model.layers.0.")}
    for leaves, layers in ((MLP, 1), (DOWN, 1), (QKV, 2), (OUT, 1)):  # of the last layer keys and values alone
        rows, columns = sum(first[leaf][0] for leaf in leaves), first[leaves[0]][1]
        assert kinds[leaves].weights == layers * rows * columns
        assert kinds[leaves].int8_bytes == layers * rows * (columns + 8)
        assert kinds[leaves].stored_bytes == layers * rows * -(-columns // 32) * (16 + 8)
    assert len(kinds) == 4


def test_most_weights_within_the_limit() -> None:
    a, b, c = (
        PromptKind(leaves=(name,), weights=size, int8_bytes=size * 10**6, stored_bytes=size // 2 * 10**6)
        for name, size in (("a", 60), ("b", 40), ("c", 32))
    )
    kinds = [a, b, c]  # all stored: 66
    assert choose_int8(kinds, None) == (a, b, c)
    for limit, chosen in ((132, (a, b, c)), (131, (a, b)), (103, (b, c)), (101, (a,)), (95, (b,)), (82, (c,))):
        assert choose_int8(kinds, limit * 10**6) == chosen  # b and c together hold more weights than a
    with pytest.raises(UsageError, match=r"82\.0 MB") as caught:
        choose_int8(kinds, 82 * 10**6 - 1)
    assert "allow 82MB" in str(caught.value)


def test_the_rest_is_the_model_s_own(made: Made) -> None:
    folder, checkpoint, details = made
    graph = onnx.load(folder / "fill.onnx", load_external_data=False).graph
    ops = {node.name: node.op_type for node in graph.node}
    assert ops["/model/layers.0/mlp/gate_up_proj/MatMulNBits"] == ops["/model/layers.0/mlp/down_proj/MatMulNBits"]
    assert "/model/layers.0/self_attn/o_proj/MatMulIntegerToFloat" in ops
    places = {t.name: t.external_data[0].value for t in graph.initializer if t.external_data}
    assert places["model.layers.0.mlp.gate_up_proj.codes"] == "model.onnx.data"
    assert {name.rpartition(".")[2] for name, place in places.items() if place == "fill.onnx.data"} == {"int8"}
    prefill = details["prefill"]
    assert prefill["int8"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert prefill["memory_bytes"] == limit_for(checkpoint, QKV, OUT)
    assert prefill["data_bytes"] == (folder / "fill.onnx.data").stat().st_size
    forms = {node["op"] for name, node in prefill["nodes"].items() if "/mlp/" in name}
    assert forms == {"MatMulNBits"}


def test_the_session_equals_the_reference_with_the_same_choice(made: Made, tokens: np.ndarray) -> None:
    folder, checkpoint, details = made
    row = tokens[:1, :24]
    with (
        FilledReference(checkpoint, int8=details["prefill"]["int8"]) as reference,
        FilledReference(checkpoint) as everything,
        OrtSession(folder, threads=1, max_length=64) as session,
    ):
        wanted, other, got = reference.prefill(row), everything.prefill(row), session.prefill(row)
    assert np.abs(got - wanted).mean() < 0.2 * np.abs(other - wanted).mean()


def test_verification_covers_both_forms(made: Made, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "genai_generates", lambda *_: "pass")
    folder, checkpoint, details = made
    quiet: dict[str, Any] = {"progress": lambda *_: None, "threads": 1}
    result = verify_export(folder, checkpoint, details, tokens, **quiet)
    assert result.passed, result.failure
    # What the manifest says is INT8 and what the graph computes must be the same linears.
    for named in (["o_proj"], [*details["prefill"]["int8"], "down_proj"]):
        wrong = {**details, "prefill": {**details["prefill"], "int8": named}}
        with pytest.raises(InputRefused, match="form that was chosen"):
            verify_export(folder, checkpoint, wrong, tokens, **quiet)


def test_explain_tells_both_forms(made: Made) -> None:
    file = next(file for file in model_files(made[0]) if file.path.name == "fill.onnx")
    kernels = {linear.name: linear.kernel for linear in explain(file.path, file.settings).linears}
    attention = {kernel for name, kernel in kernels.items() if "self_attn" in name}
    mlp = {kernel for name, kernel in kernels.items() if "mlp" in name}
    assert attention and mlp and not attention & mlp


def test_views_of_the_checkpoint(checkpoint: Any) -> None:
    weights = Int8Weights(checkpoint, ["down_proj"])
    down, up = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
    assert str(weights.quantized(down).scheme) == "W8A8 per channel act per_token"
    assert weights.quantized(up).scheme == checkpoint.schemes[up] == weights.schemes[up]
