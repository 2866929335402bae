"""What verification says of an NPU package that is right, and of ones with a mistake planted in one place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.store import stage
from qtool.runtime.npu.verify import verify_npu_export, verify_npu_package
from qtool.runtime.verify import Verification

LOUDER = 30.0
# The last norm's weight and the range of the logits behind it: the graph's logits become LOUDER times as large.
LOUD = ("model.norm.weight.uint16.scale", "lm_head.output.uint16.scale")


def quiet(*_: object) -> None:
    pass


def failing(found: Verification) -> set[str]:
    assert found.passed is not any(check.outcome == "fail" for check in found.checks)
    return {check.name for check in found.checks if check.outcome == "fail"}


def make_loud(model: onnx.ModelProto) -> None:
    for name in LOUD:
        scale = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(LOUDER), name))


def make_foreign(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Hardmax"


def changed(package: Path, folder: Path, graphs: tuple[str, ...], change: Callable[[onnx.ModelProto], None]) -> Path:
    shutil.copytree(package, folder)
    for graph in graphs:
        model = onnx.load(str(folder / graph), load_external_data=False)
        change(model)
        (folder / graph).write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize(
    ("graphs", "change", "wrong"),
    [
        ((), make_loud, set()),
        (("prefill.onnx", "decode.onnx"), make_loud, {"model"}),
        (("decode.onnx",), make_loud, {"decode"}),
        (("decode.onnx",), make_foreign, {"rules", "decode"}),
    ],
)
def test_a_mistake_fails_its_check(graphs, change, wrong, llama, llama_package, random_windows, tmp_path):
    folder = changed(llama_package, tmp_path / "package", graphs, change)
    found = verify_npu_export(folder, llama, random_windows(2), progress=quiet, threads=1)
    assert wrong == failing(found), found.failure


def test_a_package_that_answers_otherwise_than_at_export_fails(llama, llama_package, random_windows, tmp_path):
    right = tmp_path / "right"
    shutil.copytree(llama_package, right)
    verify_npu_export(right, llama, random_windows(2), progress=quiet, threads=1)
    outcomes = []
    for name, graphs in (("same", ()), ("louder", ("prefill.onnx", "decode.onnx"))):
        output = tmp_path / name
        with stage(output) as staging:
            made = changed(right, tmp_path / f"{name}-files", graphs, make_loud)
            shutil.copytree(made, staging.path, dirs_exist_ok=True)
            staging.commit(Manifest(kind="package", details={"target": "npu"}))
        outcomes.append(failing(verify_npu_package(output, progress=quiet, threads=1)))
    assert outcomes == [set(), {"answers"}]
