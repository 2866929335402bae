"""One-linear graphs in every form that onnxruntime has a fusion, or no fusion, for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx import helper as h

K, N = 128, 96
NAME = "/model/layers.0/mlp/up_proj/MatMul"
RANGES = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-127, 128), "UINT8": (0, 256)}
NUMPY: dict[str, Any] = {
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "UINT16": np.uint16,
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
    "INT64": np.int64,
}
MIDDLE = {"UINT4": 8, "UINT8": 128, "UINT16": 32768}
Parts = tuple[list[Any], list[Any]]  # nodes, initializers


def tensor(name: str, array: Any, dtype: str) -> Any:
    """An initializer; 4-bit types are packed, low half first."""
    array = np.asarray(array)
    if dtype.endswith("INT4"):
        halves = array.reshape(-1).astype(np.int64) & 15
        data = (halves[0::2] | halves[1::2] << 4).astype(np.uint8).tobytes()
    else:
        data = np.ascontiguousarray(array.astype(NUMPY[dtype])).tobytes()
    return h.make_tensor(name, getattr(TensorProto, dtype), array.shape, data, raw=True)


def model(parts: Parts, *, x: str = "FLOAT", y: str = "FLOAT") -> Any:
    """y [b, N] of x [b, K]."""
    nodes, initializers = parts
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", getattr(TensorProto, x), ["b", K])],
        [h.make_tensor_value_info("y", getattr(TensorProto, y), ["b", N])],
        initializers,
    )
    imports = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    return h.make_model(graph, opset_imports=imports, ir_version=10)


def dequantized(dtype: str, *, block: int = 0, channels: bool = False, symmetric: bool = True) -> Parts:
    """w [K, N] out of stored codes: in blocks, per channel, or per tensor."""
    codes = np.random.default_rng(0).integers(*RANGES.get(dtype, (-3, 4)), (K, N))
    shape = (N,) if channels else (K // block, N) if block else ()
    stored = [tensor("w_codes", codes, dtype), tensor("w_scale", np.full(shape, 0.01), "FLOAT")]
    inputs = ["w_codes", "w_scale"]
    if not symmetric or dtype in MIDDLE:
        stored.append(tensor("w_zero", np.full(shape, MIDDLE.get(dtype, 1)), dtype))
        inputs.append("w_zero")
    where: dict[str, int] = {"axis": 0, "block_size": block} if block else {"axis": 1} if channels else {}
    return [h.make_node("DequantizeLinear", inputs, ["w"], "w_dq", **where)], stored


def rounded(dtype: str, source: str = "x", result: str = "xq") -> Parts:
    """Q-DQ of an activation, one scale."""
    scale, zero = f"{result}_scale", f"{result}_zero"
    stored = [tensor(scale, 0.02, "FLOAT"), tensor(zero, MIDDLE.get(dtype, 0), dtype)]
    nodes = [
        h.make_node("QuantizeLinear", [source, scale, zero], [f"{result}_codes"], f"{result}_q"),
        h.make_node("DequantizeLinear", [f"{result}_codes", scale, zero], [result], f"{result}_dq"),
    ]
    return nodes, stored


def product(a: str = "x", y: str = "y") -> Parts:
    return [h.make_node("MatMul", [a, "w"], [y], NAME)], []


def together(*parts: Parts) -> Parts:
    return [node for nodes, _ in parts for node in nodes], [tensor for _, stored in parts for tensor in stored]


def weight_only(dtype: str, **options: Any) -> Any:
    return model(together(dequantized(dtype, **options), product()))


def weight_only_gemm(dtype: str, **options: Any) -> Any:
    gemm = h.make_node("Gemm", ["x", "w", "bias"], ["y"], NAME)
    return model(together(dequantized(dtype, **options), ([gemm], [tensor("bias", np.ones(N), "FLOAT")])))


def static(activation: str, weight: str, *, rounded_output: bool = False, **options: Any) -> Any:
    """Q-DQ of the activation and of the weight, and where asked of the output."""
    parts = [dequantized(weight, **options), rounded(activation)]
    parts += [product("xq", "y0"), rounded(activation, "y0", "y")] if rounded_output else [product("xq")]
    return model(together(*parts))


def row_normalised() -> Any:
    before = [
        h.make_node("Abs", ["x"], ["magnitude"], "abs"),
        h.make_node("ReduceMax", ["magnitude", "last"], ["largest"], "largest", keepdims=1),
        h.make_node("Div", ["x", "largest"], ["unit"], "unit"),
    ]
    after = [h.make_node("Mul", ["y0", "largest"], ["y"], "back")]
    parts = (dequantized("INT8", channels=True), rounded("UINT8", "unit", "xq"), product("xq", "y0"), (after, []))
    return model(together((before, [tensor("last", [-1], "INT64")]), *parts))


def dynamic() -> Any:
    nodes = [
        h.make_node("DynamicQuantizeLinear", ["x"], ["xc", "xs", "xz"], "quantize"),
        h.make_node("MatMulInteger", ["xc", "w_codes", "xz"], ["yi"], NAME),
        h.make_node("Cast", ["yi"], ["yf"], "cast", to=TensorProto.FLOAT),
        h.make_node("Mul", ["xs", "w_scale"], ["scale"], "scales"),
        h.make_node("Mul", ["yf", "scale"], ["y"], "scaled"),
    ]
    _, stored = dequantized("INT8")
    return model((nodes, stored))


def integers(activation: str) -> Any:
    """MatMulInteger on an integer input."""
    inputs, stored = ["x", "w_codes"], dequantized("INT8")[1][:1]
    if activation == "UINT8":
        inputs.append("middle")
        stored.append(tensor("middle", 128, "UINT8"))
    nodes = [
        h.make_node("MatMulInteger", inputs, ["yi"], NAME),
        h.make_node("Cast", ["yi"], ["y"], "cast", to=TensorProto.FLOAT),
    ]
    return model((nodes, stored), x=activation)


def nbits(bits: int, level: int | None, *, block: int = 32, activation: str = "", group_index: bool = False) -> Any:
    codes = np.random.default_rng(0).integers(0, 256, (N, K // block, block * bits // 8))
    stored = [tensor("codes", codes, "UINT8"), tensor("scales", np.ones((N, K // block)), "FLOAT")]
    inputs = ["xq" if activation else "x", "codes", "scales"]
    if group_index:
        index = h.make_tensor("index", TensorProto.INT32, (K,), list(np.arange(K) // block))
        inputs, stored = [*inputs, "", "index"], [*stored, index]
    attributes = {"K": K, "N": N, "bits": bits, "block_size": block}
    if level is not None:
        attributes["accuracy_level"] = level
    node = h.make_node("MatMulNBits", inputs, ["y"], NAME, domain="com.microsoft", **attributes)
    return model(together(rounded(activation) if activation else ([], []), ([node], stored)))


def plain(dtype: str) -> Any:
    weight = np.random.default_rng(0).standard_normal((K, N))
    return model(together(product(), ([], [tensor("w", weight, dtype)])), x=dtype, y=dtype)


@pytest.fixture(scope="session")
def graphs() -> SimpleNamespace:
    """The makers above, by name."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if callable(value)})


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """saved(model) -> its file."""

    def save(proto: Any) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return save


@pytest.fixture
def really_runs(tmp_path: Path) -> Callable[..., dict[str, int]]:
    """really_runs(file, level, config) -> operators of the graph that a session on the file itself, weights and all,
    runs, and how many of each."""
    import onnxruntime as ort

    def run(path: Path, level: str = "ORT_ENABLE_ALL", config: dict[str, str] | None = None) -> dict[str, int]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(tmp_path / "really.onnx")
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(str(tmp_path / "really.onnx"), load_external_data=False).graph
        return dict(sorted(Counter(node.op_type for node in graph.node if node.op_type != "Constant").items()))

    return run
