"""The copy without weights: what it costs, and what it refuses."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper as h

from qtool.errors import EnvironmentFault, InputRefused, UsageError
from qtool.runtime.explain import Settings, child, explain, optimized_graph
from qtool.runtime.explain.stand_in import SMALL_BYTES, read_graph, write_stand_in

GIBIBYTE = 2**30
K, N, BLOCK = 4096, 2**19, 32  # 4-bit codes of one GiB


def beside(name: str, dtype: int, shape: list[int], size: int, *, location: str = "data", offset: str = "0") -> Any:
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def large(folder: Path) -> Path:
    """A linear of 2³¹ weights whose data file is a hole too."""
    codes = beside("codes", onnx.TensorProto.UINT8, [N, K // BLOCK, BLOCK // 2], GIBIBYTE)
    scales = beside("scales", onnx.TensorProto.FLOAT, [N, K // BLOCK], N * K // BLOCK * 4)
    attributes = {"K": K, "N": N, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    node = h.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], "/lm_head/MatMul", "", **attributes)
    node.domain = "com.microsoft"
    graph = h.make_graph(
        [node],
        "g",
        [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", K])],
        [h.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", N])],
        [codes, scales],
    )
    imports = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    path = folder / "model.onnx"
    path.write_bytes(h.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
    with (folder / "data").open("wb") as file:
        file.truncate(GIBIBYTE)
    return path


def on_disk(folder: Path) -> int:
    return sum(file.lstat().st_blocks * 512 for file in folder.iterdir())


def test_a_gigabyte_of_weights_takes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def run(program: str, model: Path, asked: dict[str, Any]) -> dict[str, Any]:
        answer = child.run_child(program, model, asked)
        used.append(on_disk(Path(asked["optimized"]).parent))
        return answer

    monkeypatch.setattr(optimized_graph, "run_child", run)
    found = explain(large(tmp_path))
    assert found.linears[0].weight_bytes == GIBIBYTE + N * K // BLOCK * 4
    assert found.linears[0].kernel == "MatMulNBits level 4, 4 bits, block 32"
    assert used
    assert max(used) < 1_000_000


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    explain(large(tmp_path))
    assert list(temporary.iterdir()) == []


def test_small_tensors_keep_their_numbers_wherever_they_lie(tmp_path: Path) -> None:
    small = beside("small", onnx.TensorProto.FLOAT, [4], 16, offset="16")
    big = onnx.TensorProto(name="big", data_type=onnx.TensorProto.FLOAT, dims=[SMALL_BYTES // 4])
    big.raw_data = b"\1" * SMALL_BYTES
    graph = h.make_graph([h.make_node("Add", ["small", "big"], ["y"])], "g", [], [], [small, big])
    source = tmp_path / "model.onnx"
    source.write_bytes(h.make_model(graph).SerializeToString())
    (tmp_path / "data").write_bytes(b"\0" * 16 + bytes(range(16)))
    (tmp_path / "out").mkdir()
    copy = onnx.load(str(write_stand_in(read_graph(source), source, tmp_path / "out")), load_external_data=False)
    kept, hollow = copy.graph.initializer
    assert kept.raw_data == bytes(range(16))
    assert not kept.external_data
    assert not hollow.raw_data
    assert hollow.data_location == onnx.TensorProto.EXTERNAL


@pytest.mark.parametrize(
    ("location", "offset", "words"),
    [
        ("../data", "0", "keep data inside"),
        ("/etc/hostname", "0", "keep data inside"),
        ("missing", "0", "is missing"),
        ("data", str(GIBIBYTE), "does not lie inside"),
        ("data", "-1", "does not lie inside"),
        ("data", "x", "does not lie inside"),
    ],
)
def test_data_that_cannot_be_the_models_are_refused(location: str, offset: str, words: str, tmp_path: Path) -> None:
    path = large(tmp_path)
    model = read_graph(path)
    for entry in model.graph.initializer[0].external_data:
        entry.value = {"location": location, "offset": offset}.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputRefused, match=words):
        explain(path)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"", b"\xff" * 64, b"<html>"],
    ids=["lfs", "empty", "bytes", "html"],
)
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputRefused, match=r"is not an ONNX model|holds no graph"):
        explain(path)
    with pytest.raises(UsageError, match="does not exist"):
        explain(tmp_path / "other.onnx")


def test_a_graph_that_the_runtime_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    x, y = (h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b"]) for name in "xy")
    graph = h.make_graph([h.make_node("NoSuchOperator", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path / "model.onnx"
    path.write_bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10).SerializeToString())
    with pytest.raises(InputRefused, match="NoSuchOperator") as refusal:
        explain(path)
    assert "qtool-explain-" not in str(refusal.value)
    path.write_bytes(h.make_model(graph, opset_imports=[h.make_opsetid("", 99)], ir_version=10).SerializeToString())
    with pytest.raises(InputRefused, match="older opset"):
        explain(path)


def test_a_crash_and_a_hang_of_the_runtime_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = large(tmp_path)

    def crash(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -11, "", "")

    def hang(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(child.subprocess, "run", crash)
    with pytest.raises(InputRefused, match="crashes on it"):
        explain(path)
    monkeypatch.setattr(child.subprocess, "run", hang)
    with pytest.raises(EnvironmentFault, match="--level basic"):
        explain(path)


def test_the_child_sees_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    run: Callable[..., Any] = subprocess.run

    def spy(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        seen.append(env)
        return run(command, env=env, **options)

    monkeypatch.setenv("QTOOL_TEST_SECRET", "x")
    monkeypatch.setattr(child.subprocess, "run", spy)
    explain(large(tmp_path), Settings(level="basic"))
    assert seen
    assert all(set(env) <= {"PATH", "OMP_NUM_THREADS", "SystemRoot"} for env in seen)
    assert "QTOOL_TEST_SECRET" in os.environ
