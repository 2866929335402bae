"""Verification must pass what was exported and catch every way of it being something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.store import stage
from qtool.runtime import verify as verify_module
from qtool.runtime.verification.genai import genai_generates
from qtool.runtime.verification.node_model import PackageGraph
from qtool.runtime.verification.node_probes import TOLERANCE, NodeProbe, make_probe, probe_error
from qtool.runtime.verification.probe_file import read_probes
from qtool.runtime.verify import Check, verify_export, verify_package


def quiet(*_: object) -> None:
    pass


@pytest.fixture(autouse=True)
def without_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process per test is slow; one test below asks genai itself."""
    monkeypatch.setattr(verify_module, "genai_generates", lambda *_: "pass")


SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a8": ("W4A8", {"group_size": 32}),
    "w4a8 with zero points, ragged": ("W4A8", {"group_size": 64, "symmetric": False}),
    "w4a16": ("W4A16", {"group_size": 32}),
    "w8a8": ("W8A8", {"group_size": 32, "activation": "per_token_group"}),
    "w8a8 per token": ("W8A8", {}),
}
Made = tuple[Path, QuantizedCheckpoint, dict[str, Any]]


@pytest.fixture(scope="session")
def make(
    make_checkpoint: Callable[..., Any],
    export_to: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Made]:
    """A package that is not committed, its checkpoint and its details, by a name of SCHEMES."""

    def make(name: str) -> Made:
        scheme, options = SCHEMES[name]
        checkpoint = make_checkpoint(scheme, family="qwen2", **options)
        folder = tmp_path_factory.mktemp("packages") / "package"
        return folder, checkpoint, export_to(checkpoint, folder)

    return make


@pytest.fixture(scope="session", params=SCHEMES)
def made(request: pytest.FixtureRequest, make: Callable[[str], Made]) -> Made:
    return make(request.param)


@pytest.fixture(scope="session")
def w4a8(make: Callable[[str], Made]) -> Made:
    return make("w4a8")


@pytest.fixture(scope="session")
def with_zeros(make: Callable[[str], Made]) -> Made:
    return make("w4a8 with zero points, ragged")


def commit(made: Made, output: Path, result_bytes: bytes | None = None) -> Path:
    folder, checkpoint, details = made
    with stage(output) as staging:
        for path in folder.iterdir():
            shutil.copy(path, staging.path)
        if result_bytes is not None:
            (staging.path / "verification.json").write_bytes(result_bytes)
        staging.commit(
            Manifest(kind="package", parents=(Parent(kind="checkpoint", digest=checkpoint.digest),), details=details)
        )
    return output


def test_an_export_verifies_and_its_package_verifies_again_without_the_checkpoint(
    made: Made, tokens: np.ndarray, tmp_path: Path
) -> None:
    folder, checkpoint, details = made
    result = verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1)
    assert result.passed, result.failure
    assert {c.name: c.outcome for c in result.checks} == dict.fromkeys(("nodes", "model", "decode", "genai"), "pass")
    assert result.checks[0].numbers["nodes"] == len(details["nodes"])
    package = commit(made, tmp_path / "package", result.to_bytes())
    again = verify_package(package, progress=quiet, threads=1)
    assert again.passed, again.failure
    assert again.checks[0].numbers == result.checks[0].numbers


def test_the_same_export_gives_the_same_bytes(w4a8: Made, tokens: np.ndarray) -> None:
    folder, checkpoint, details = w4a8
    first = verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1).to_bytes()
    probes = (folder / "probes.safetensors").read_bytes()
    assert verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1).to_bytes() == first
    assert (folder / "probes.safetensors").read_bytes() == probes
    json.loads(first)


def test_a_float_package_verifies(
    float_package: Path, make_source: Callable[..., Any], tokens: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(float_package, folder)
    result = verify_export(folder, make_source("llama"), {"nodes": {}}, tokens, progress=quiet, threads=1)
    assert result.passed, result.failure
    assert result.checks[0].outcome == "skipped"


def test_a_package_of_another_checkpoint_fails(
    w4a8: Made,
    make_source: Callable[..., Any],
    quantize_all: Callable[..., QuantizedCheckpoint],
    tokens: np.ndarray,
    tmp_path: Path,
) -> None:
    folder, checkpoint, details = w4a8
    other = make_source("qwen2", tied=True, seed=1)
    strange = quantize_all(other, tmp_path / "other", next(iter(checkpoint.schemes.values())))
    copy = tmp_path / "package"
    shutil.copytree(folder, copy)
    result = verify_export(copy, strange, details, tokens, progress=quiet, threads=1)
    assert [c.outcome for c in result.checks[:2]] == ["fail", "fail"]
    assert "nodes: error" in result.failure and "model: kl_nats" in result.failure


# Tampering. The data file is rewritten whole, so that only what a runtime computes can tell.


def edit(folder: Path, copy: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """A copy of a package with one initializer changed in place."""
    shutil.copytree(folder, copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entry = {e.key: e.value for e in tensor.external_data}
    if not entry:
        array = numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.raw_data = array.tobytes()
        (copy / "model.onnx").write_bytes(model.SerializeToString())
        return copy
    path = copy / entry["location"]
    data = np.fromfile(path, dtype=np.uint8)
    start, length = int(entry.get("offset", 0)), int(entry["length"])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    change(data[start : start + length].view(dtype).reshape(tuple(tensor.dims)))
    path.write_bytes(data.tobytes())
    return copy


def error_of(folder: Path, node: str, probe: NodeProbe) -> float:
    return probe_error(PackageGraph(folder, threads=1), node, probe)


def initializers(folder: Path) -> dict[str, tuple[int, ...]]:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


HEAD, DOWN = "/lm_head/MatMulNBits", "/model/layers.1/mlp/down_proj/MatMulNBits"


def probe_of(made: Made, node: str) -> NodeProbe:
    folder, checkpoint, details = made
    with_bias = PackageGraph(folder).has_bias(node)
    return make_probe(node, details["nodes"][node], checkpoint, with_bias=with_bias)


def test_one_scale_changed_by_one_percent_is_caught_wherever_it_is(with_zeros: Made, tmp_path: Path) -> None:
    folder = with_zeros[0]
    node, name = DOWN, "model.layers.1.mlp.down_proj.scales"
    probe = probe_of(with_zeros, node)
    rows, blocks = initializers(folder)[name]
    assert error_of(folder, node, probe) <= TOLERANCE / 5
    missed = []
    for i, index in enumerate(np.ndindex(rows, blocks)):
        if i % 3:
            continue

        def one_percent(a: np.ndarray, at: tuple[int, ...] = index) -> None:
            a[at] *= 1.01

        copy = edit(folder, tmp_path / f"p{i}", name, one_percent)
        missed += [] if error_of(copy, node, probe) > TOLERANCE else [index]
        shutil.rmtree(copy)
    assert not missed


def test_smallest_scale_of_a_node_counts_too(w4a8: Made, tmp_path: Path) -> None:
    folder, checkpoint, _ = w4a8
    probe = probe_of(w4a8, HEAD)
    scale = checkpoint.quantized("lm_head").scale.numpy()
    smallest = np.unravel_index((scale / scale.max(axis=1, keepdims=True)).argmin(), scale.shape)

    def one_percent(a: np.ndarray) -> None:
        a[smallest] *= 1.01

    assert error_of(edit(folder, tmp_path / "p", "lm_head.scales", one_percent), HEAD, probe) > TOLERANCE


def swap_nibbles(a: np.ndarray) -> None:
    a[:] = (a << 4) | (a >> 4)


def one_code(a: np.ndarray) -> None:
    a.reshape(-1)[1234] ^= 1


def no_zero_points(a: np.ndarray) -> None:
    a[:] = 0x88


def one_zero_point(a: np.ndarray) -> None:
    a[7, 0] ^= 1


def not_a_number(a: np.ndarray) -> None:
    a[3, 1] = np.nan


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("codes", swap_nibbles),
        ("codes", one_code),
        ("zero_points", no_zero_points),
        ("zero_points", one_zero_point),
        ("scales", not_a_number),
    ],
)
def test_tampered_bytes_are_caught(
    with_zeros: Made, tmp_path: Path, part: str, change: Callable[[np.ndarray], None]
) -> None:
    probe = probe_of(with_zeros, DOWN)
    copy = edit(with_zeros[0], tmp_path / "p", f"model.layers.1.mlp.down_proj.{part}", change)
    assert not error_of(copy, DOWN, probe) <= TOLERANCE


def test_a_changed_bias_is_caught(with_zeros: Made, tmp_path: Path) -> None:
    node = next(n for n in with_zeros[2]["nodes"] if "layers.0/self_attn/qkv" in n)
    probe = probe_of(with_zeros, node)
    name = next(n for n in initializers(with_zeros[0]) if "layers.0.self_attn.qkv" in n and n.endswith("bias"))

    def one_percent(a: np.ndarray) -> None:
        a[np.abs(a).argmax()] *= 1.01

    assert error_of(edit(with_zeros[0], tmp_path / "p", name, one_percent), node, probe) > TOLERANCE


def test_the_embedding_lookup_is_probed(w4a8: Made, tmp_path: Path) -> None:
    node = "/model/embed_tokens/GatherBlockQuantized"
    probe = probe_of(w4a8, node)
    assert error_of(w4a8[0], node, probe) <= TOLERANCE / 5

    def one_percent(a: np.ndarray) -> None:
        a[100, 1] *= 1.01

    assert error_of(edit(w4a8[0], tmp_path / "p", "lm_head.scales", one_percent), node, probe) > TOLERANCE


def test_float_activations_are_not_taken_for_int8_ones(w4a8: Made, tmp_path: Path) -> None:
    copy = tmp_path / "p"
    shutil.copytree(w4a8[0], copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.name == DOWN)
    next(a for a in node.attribute if a.name == "accuracy_level").i = 1
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    assert error_of(copy, DOWN, probe_of(w4a8, DOWN)) > TOLERANCE


def test_a_tampered_package_with_a_fresh_manifest_fails(w4a8: Made, tokens: np.ndarray, tmp_path: Path) -> None:
    folder, checkpoint, details = w4a8
    verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1)

    def one_percent(a: np.ndarray) -> None:
        a[11, 1] *= 1.01

    forged = edit(folder, tmp_path / "edited", "model.layers.0.self_attn.o_proj.scales", one_percent)
    package = commit((forged, checkpoint, details), tmp_path / "package")
    result = verify_package(package, progress=quiet, threads=1)
    assert not result.passed
    assert result.checks[0].outcome == "fail" and "o_proj" in result.checks[0].detail


def test_a_package_with_a_changed_byte_is_refused(w4a8: Made, tokens: np.ndarray, tmp_path: Path) -> None:
    folder, checkpoint, details = w4a8
    verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1)
    package = commit(w4a8, tmp_path / "package")
    path = package / "probes.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputRefused, match=r"probes\.safetensors"):
        verify_package(package, progress=quiet)


def test_a_changed_norm_shows_in_the_stored_losses(w4a8: Made, tokens: np.ndarray, tmp_path: Path) -> None:
    folder, checkpoint, details = w4a8
    verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1)

    def scaled(a: np.ndarray) -> None:
        a[:16] *= 1.5

    forged = edit(folder, tmp_path / "edited", "model.layers.1.post_attention_layernorm.weight", scaled)
    package = commit((forged, checkpoint, details), tmp_path / "package")
    result = verify_package(package, progress=quiet, threads=1)
    assert [c.name for c in result.checks if c.outcome == "fail"] == ["model"]


@pytest.mark.parametrize("change", ["missing", "extra", "other op"])
def test_the_list_of_nodes_must_be_the_graphs(w4a8: Made, tokens: np.ndarray, change: str) -> None:
    folder, checkpoint, details = w4a8
    nodes = dict(details["nodes"])
    if change == "missing":
        del nodes[DOWN]
    elif change == "extra":
        nodes["/x"] = nodes[DOWN]
    else:
        nodes[DOWN] = {**nodes[DOWN], "op": "GatherBlockQuantized"}
    with pytest.raises(InputRefused, match="node /"):
        verify_export(folder, checkpoint, {"nodes": nodes}, tokens, progress=quiet)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/file"])
def test_data_outside_the_folder_is_never_opened(w4a8: Made, tmp_path: Path, location: str) -> None:
    copy = tmp_path / "p"
    shutil.copytree(w4a8[0], copy)
    (tmp_path / "secret").write_bytes(bytes(10**6))
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = location
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputRefused, match="is stored in"):
        PackageGraph(copy)


def test_data_beyond_the_end_of_its_file_is_refused(w4a8: Made, tmp_path: Path) -> None:
    copy = tmp_path / "p"
    shutil.copytree(w4a8[0], copy)
    path = copy / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputRefused, match="does not lie inside"):
        PackageGraph(copy)


def test_a_number_that_is_not_one_fails_its_check() -> None:
    check = Check(name="model", numbers={"kl_nats": float("nan")}, limits={"kl_nats": 1.0})
    assert check.outcome == "fail"
    assert replace(check, numbers={"kl_nats": 0.5}).outcome == "pass"
    assert replace(check, numbers={"kl_nats": float("inf")}).outcome == "fail"


def test_probes_survive_the_file(w4a8: Made, tokens: np.ndarray) -> None:
    folder, checkpoint, details = w4a8
    verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1)
    probes = read_probes(folder)
    assert np.array_equal(probes.tokens, tokens)
    assert set(probes.nodes) == set(details["nodes"])
    wanted = probe_of(w4a8, HEAD)
    for name in ("expected", "bound", "exponents"):
        assert np.array_equal(getattr(probes.nodes[HEAD], name), getattr(wanted, name))
    assert probes.nodes[HEAD].expected.shape == (4, 320)


def test_genai_itself_generates(w4a8: Made, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    assert genai_generates(w4a8[0], [1, 2, 3], 320) == "pass"
    assert genai_generates(tmp_path, [1, 2, 3], 320).startswith("fail: exit")
