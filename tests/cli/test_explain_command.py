"""qtool explain: its tables, its JSON, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as h

LAYERS = 3


def qtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "qtool.cli", "explain", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder of two files: `model.onnx` of floats, and one with weights that are dequantized at every call."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(chain(rounded=False).SerializeToString())
    (folder / "onnx" / "model_u16.onnx").write_bytes(chain(rounded=True).SerializeToString())
    return folder


def chain(*, rounded: bool) -> Any:
    """LAYERS products one after the other."""
    nodes, stored = [], []
    for layer in range(LAYERS):
        weight, source = f"model.layers.{layer}.mlp.up_proj.weight", f"x{layer}" if layer else "x"
        codes = np.ones((32, 32), np.int8)
        stored.append(numpy_helper.from_array(codes if rounded else codes.astype(np.float32), weight))
        if rounded:
            stored += [
                numpy_helper.from_array(np.float32(0.1), f"s{layer}"),
                numpy_helper.from_array(np.uint16(9), f"z{layer}"),
            ]
            nodes += [
                h.make_node("QuantizeLinear", [source, f"s{layer}", f"z{layer}"], [f"c{layer}"], f"q{layer}"),
                h.make_node("DequantizeLinear", [f"c{layer}", f"s{layer}", f"z{layer}"], [f"d{layer}"], f"dq{layer}"),
                h.make_node("DequantizeLinear", [weight, f"s{layer}"], [f"w{layer}"], f"wdq{layer}"),
            ]
        inputs = [f"d{layer}", f"w{layer}"] if rounded else [source, weight]
        nodes.append(h.make_node("MatMul", inputs, [f"x{layer + 1}"], f"/model/layers.{layer}/mlp/up_proj/MatMul"))
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 32])],
        [h.make_tensor_value_info(f"x{LAYERS}", TensorProto.FLOAT, ["b", "s", 32])],
        stored,
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


def test_a_folder_is_explained_file_by_file_role_by_role(folder: Path) -> None:
    done = qtool(folder)
    assert done.returncode == 0, done.stderr
    plain, bad = done.stdout.split("model_u16.onnx")
    (row,) = [line for line in plain.splitlines() if "mlp.up_proj" in line]
    assert "layers.*.mlp.up_proj" in row
    assert f" {LAYERS} " in row
    assert "MatMul float32" in row
    assert "no warnings" in plain
    assert "predicted" in plain
    assert "DequantizeLinear at every call" in bad
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == 2
    assert "(model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, model.layers.2.mlp.up_proj)" in warnings[0]


def test_strict_exits_5_for_a_warning_alone(folder: Path) -> None:
    assert qtool(folder / "onnx" / "model.onnx", "--strict").returncode == 0
    done = qtool(folder / "onnx" / "model_u16.onnx", "--strict")
    assert done.returncode == 5
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "2 warning(s), first: weights are dequantized" in last


def test_json_holds_every_linear_and_a_remedy_helps(folder: Path) -> None:
    arguments = (folder / "onnx" / "model_u16.onnx", "--json", "--session", "session.disable_quant_qdq=1")
    (found,) = json.loads(qtool(*arguments).stdout)
    assert [linear["name"] for linear in found["linears"]] == [
        f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS)
    ]
    assert {linear["kernel"] for linear in found["linears"]} == {"MatMul float32"}
    assert found["config"] == {"session.disable_quant_qdq": "1"}
    assert found["warnings"] == 1
    assert [trap["code"] for trap in found["traps"] if trap["warning"]] == ["16-bit-activations"]


def test_all_lists_every_linear_and_profile_measures(folder: Path) -> None:
    numbers = ("--length", "8", "--steps", "2", "--threads", "1")
    done = qtool(folder / "onnx" / "model.onnx", "--all", "--profile", *numbers)
    assert done.returncode == 0, done.stderr
    assert "layers.1.mlp.up_proj" in done.stdout
    assert "measured with 1 threads" in done.stdout
    assert "MatMul model.layers.*.mlp.up_proj" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--session", "nonsense"), 2, "KEY=VALUE"),
        (("--level", "most"), 2, "extended"),
    ],
)
def test_wrong_options_are_refused(arguments: tuple[str, ...], code: int, words: str, folder: Path) -> None:
    done = qtool(folder, *arguments)
    assert done.returncode == code
    assert words in done.stderr.strip().splitlines()[-1]


def test_what_is_not_there_and_what_is_no_model(tmp_path: Path) -> None:
    assert qtool(tmp_path / "nothing").returncode == 2
    (tmp_path / "model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    done = qtool(tmp_path)
    assert done.returncode == 3
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_names_out_of_a_file_are_printed_as_they_are_but_for_control_characters(tmp_path: Path) -> None:
    model = chain(rounded=True)
    for node in model.graph.node:
        node.name = node.name.replace("/mlp/", "/[red]\x1b[2J/")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    done = qtool(tmp_path, "--all")
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text
        assert "[red]" in text
