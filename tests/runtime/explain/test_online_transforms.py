"""What online transforms take of a decode step: found in packages, told, and warned of above 5 %."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx import helper as h

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.runtime.explain import Explanation, explain, measure, model_files, online_line, with_measured
from qtool.runtime.explain.online import CODE, site_of
from qtool.runtime.explain.report import Measured

WIDE = 1024


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> dict[str, Path]:
    """W4A8 packages of one tiny model: plain, behind QUAD with low-rank corrections, behind Hadamard rotations."""
    from importlib import import_module

    from click.testing import CliRunner

    place = tmp_path_factory.mktemp("online")
    write_model(place / "model", "llama")

    def qtool(name: str, *arguments: Any) -> None:
        command = import_module(f"qtool.cli.{name}").command
        done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    found = {}
    options = {
        "plain": (),
        "quad": ("--transform", "quad", "--rank", 8, "--low-rank", 2, "--sequences", 2, "--length", 32),
        "hadamard": ("--transform", "hadamard"),
    }
    for name, extra in options.items():
        scheme = ("--scheme", "W4A8", "--group-size", 32, "--quantizer", "rtn", "--threads", 1)
        qtool("quantize", place / "model", "-o", place / f"{name}-checkpoint", *scheme, *extra)
        prefill = ("--prefill", "w8a8") if name == "quad" else ()
        found[name] = place / name
        qtool("export", place / f"{name}-checkpoint", "-o", found[name], "--no-verify", *prefill)
    return found


def explained(folder: Path, file: str = "model.onnx") -> Explanation:
    (found,) = (each for each in model_files(folder) if each.path.name == file)
    return explain(found.path, found.settings, length=64)


def warned(explanation: Explanation) -> bool:
    return CODE in [trap.code for trap in explanation.warnings]


def test_without_transforms_nothing_is_told(packages: dict[str, Path]) -> None:
    explanation = explained(packages["plain"])
    assert explanation.online is None
    assert online_line(explanation) is None
    assert not warned(explanation)
    assert {part.name for part in explanation.parts} == {"attention", "other nodes"}


@pytest.mark.parametrize("kind", ["quad", "hadamard"])
def test_every_node_of_a_transform_is_counted_and_nothing_else(kind: str, packages: dict[str, Path]) -> None:
    """What the package has more than a plain one, but for constants that the runtime folds when it loads."""
    explanation, plain = explained(packages[kind]), explained(packages["plain"])
    online = explanation.online
    assert online is not None
    assert online.nodes == sum(explanation.nodes.values()) - sum(plain.nodes.values())
    whole = sum(linear.decode_us for linear in explanation.linears) + sum(p.decode_us for p in explanation.parts)
    before = sum(linear.decode_us for linear in plain.linears) + sum(part.decode_us for part in plain.parts)
    assert online.decode_share == pytest.approx((whole - before) / whole, rel=0.02)
    graph = onnx.load(packages[kind] / "model.onnx", load_external_data=False).graph
    details = QuantizedCheckpoint(packages[kind].with_name(f"{kind}-checkpoint")).manifest.details["quantized"]
    transformed = {site_of(node.name) for node in graph.node} - {None}
    assert {module for module in details if "transform" in details[module]} & transformed
    assert warned(explanation)  # of so small a model every node takes much
    assert [trap.code for trap in explanation.warnings] == [CODE]  # nothing else is wrong with our own package


def test_the_line_says_how_much_and_a_profile_has_the_last_word(packages: dict[str, Path]) -> None:
    (file,) = (each for each in model_files(packages["quad"]) if each.path.name == "model.onnx")
    predicted = explain(file.path, file.settings, length=32)
    assert predicted.online is not None
    assert f"{100 * predicted.online.decode_share:.1f} % of a decode step" in str(online_line(predicted))
    measured = measure(file, predicted, steps=2, threads=1)
    assert 0 < measured.online_decode_share < 1
    assert 0 < measured.online_prefill_share < 1
    with_times = with_measured(predicted, measured)
    assert "measured" in str(online_line(with_times))
    for share in (0.04, 0.06):
        judged = with_measured(predicted, _measured(share))
        assert warned(judged) is (share > 0.05)
        assert len(judged.traps) == len(predicted.traps) - (share <= 0.05)
    assert "measured" in next(trap.what for trap in judged.traps if trap.code == CODE)


def test_a_graph_that_only_reads_prompts_has_no_decode_step_to_warn_of(packages: dict[str, Path]) -> None:
    explanation = explained(packages["quad"], "fill.onnx")
    assert explanation.online is not None
    assert not warned(explanation)
    assert "decode step" not in str(online_line(explanation))


@pytest.mark.parametrize(("rotated", "share"), [(1, "below"), (4, "above")])
def test_a_planted_share_is_warned_of_above_five_percent(
    rotated: int, share: str, graphs: Any, saved: Callable[[Any], Path]
) -> None:
    """Four products that read 4 MB each, about 170 µs; a rotation's two nodes with a price take 17 µs."""
    explanation = explain(saved(chain(graphs, rotated)), length=64)
    assert explanation.online is not None
    assert explanation.online.nodes == 4 * rotated
    assert explanation.online.sites == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(rotated))
    assert (explanation.online.decode_share > 0.05) is (share == "above")
    assert warned(explanation) is (share == "above")


def chain(graphs: Any, rotated: int) -> Any:
    """Products one after the other, the first `rotated` behind signs and a product with a matrix of 64 × 64."""
    stored = [
        graphs.tensor("signs", np.arange(WIDE), "FLOAT"),
        graphs.tensor("matrix", np.ones((64, 64)), "FLOAT"),
        graphs.tensor("cut", [-1, WIDE // 64, 64], "INT64"),
        graphs.tensor("whole", [-1, WIDE], "INT64"),
    ]
    nodes, value = [], "x"
    for layer in range(4):
        path = f"/model/layers.{layer}/mlp/down_proj"
        if layer < rotated:
            steps = (
                ("signs/Mul", "signs"),
                ("blocks/Reshape", "cut"),
                ("hadamard/MatMul", "matrix"),
                ("rows/Reshape", "whole"),
            )
            for step, constant in steps:
                made = f"{step}{layer}"
                operator = step.partition("/")[2]
                nodes.append(h.make_node(operator, [value, constant], [made], f"{path}/input/hadamard/{step}"))
                value = made
        stored.append(graphs.tensor(f"w{layer}", np.full((WIDE, WIDE), layer), "FLOAT"))
        nodes.append(h.make_node("MatMul", [value, f"w{layer}"], [f"y{layer}"], f"{path}/MatMul"))
        value = f"y{layer}"
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WIDE])],
        [h.make_tensor_value_info(value, TensorProto.FLOAT, ["b", WIDE])],
        stored,
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


def _measured(share: float) -> Measured:
    return Measured(
        threads=1, tokens=8, steps=1, decode_ms=1.0, prefill_ms=1.0, rows={}, online_decode_share=share
    )
