"""Verification of online transforms and side products: it passes what was exported and catches every damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.artifacts.store import stage
from qtool.quantize.transforms.directions import second_moment_of
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.low_rank import LowRank, low_rank
from qtool.quantize.transforms.quad import quad
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.then_divide import ThenDivide
from qtool.runtime import verify as verify_module
from qtool.runtime.verification.node_model import PackageGraph
from qtool.runtime.verification.node_probes import TOLERANCE
from qtool.runtime.verification.online_probes import check_surroundings, make_online_probe, online_error
from qtool.runtime.verify import verify_export, verify_package

Made = tuple[Path, QuantizedCheckpoint, dict[str, Any]]
QKV = "/model/layers.1/self_attn/qkv_proj"
DOWN = "/model/layers.1/mlp/down_proj"
SITE = "model.layers.1.self_attn.q_proj.input.t"
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@pytest.fixture(autouse=True)
def without_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process per test is slow; the export's tests ask genai."""
    monkeypatch.setattr(verify_module, "genai_generates", lambda *_: "pass")


def quiet(*_: object) -> None:
    pass


def transform_for(module: str, columns: int) -> SiteTransform:
    """Directions and a rotation; down_proj has calibrated factors behind them."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(4 * columns, columns, generator=generator) * torch.logspace(1, -1, columns)
    made = quad(second_moment_of(x), 4, seed=1, stream=str(columns))
    if not module.endswith("down_proj"):
        return made
    factors = torch.rand(columns, generator=generator) + 0.5
    return ThenDivide(first=made, division=DivideChannels(factors=factors))


@pytest.fixture(scope="session")
def made(
    make_source: Callable[..., Any],
    quantize_blocks: Callable[..., QuantizedCheckpoint],
    round_nearest: Callable[..., QuantizedTensor],
    export_to: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """A package with everything, its checkpoint and its details."""

    def quantizer(module: str, weight: torch.Tensor, scheme: Any) -> QuantizedTensor:
        parent, _, leaf = module.rpartition(".")
        transform = transform_for(module, weight.shape[1])
        main, side = transform.weight(weight)
        rounded = round_nearest(main, scheme)
        found = low_rank(main - rounded.dequantize(), 3)
        correction = LowRank(up=found.up.half().float(), down=found.down.half().float())
        assert side is not None
        site = f"{parent}.{FIRST.get(leaf, leaf)}.input.t"
        return replace(
            rounded, transform=transform, site=site, side=side.half().float(), low_rank=correction
        )

    folder = tmp_path_factory.mktemp("online")
    source = make_source("qwen2")
    checkpoint = quantize_blocks(source, folder / "checkpoint", layer_scheme("W4A8", group_size=32), quantizer)
    return folder / "package", checkpoint, export_to(checkpoint, folder / "package")


def verified(made: Made, tokens: np.ndarray) -> Any:
    folder, checkpoint, details = made
    return verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1)


def test_an_export_verifies_and_its_package_verifies_again_without_the_checkpoint(
    made: Made, tokens: np.ndarray, tmp_path: Path
) -> None:
    folder, checkpoint, details = made
    result = verified(made, tokens)
    assert result.passed, result.failure
    assert [check.name for check in result.checks] == ["nodes", "online", "model", "decode", "genai"]
    assert result.checks[1].numbers["nodes"] == 2 * 4 and result.checks[1].numbers["error"] < TOLERANCE / 2
    with stage(tmp_path / "package") as staging:
        for path in folder.iterdir():
            shutil.copy(path, staging.path)
        parents = (Parent(kind="checkpoint", digest=checkpoint.digest),)
        staging.commit(Manifest(kind="package", parents=parents, details=details))
    again = verify_package(tmp_path / "package", progress=quiet, threads=1)
    assert again.passed, again.failure
    assert again.checks[1].numbers == result.checks[1].numbers


# Damage. The files are rewritten whole, so that only what a runtime computes can tell.


def damaged(folder: Path, copy: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a package with its model.onnx changed."""
    shutil.copytree(folder, copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    change(model)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    return copy


def values(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> Callable[[onnx.ModelProto], None]:
    """Change one initializer of a package in this folder; it becomes part of model.onnx."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor, str(folder)).copy()
        change(array)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return edit


def error_of(made: Made, folder: Path, node: str) -> float:
    _, checkpoint, details = made
    described = details["nodes"][f"{node}/MatMulNBits"]
    probe = make_online_probe(node, described, checkpoint)
    return online_error(PackageGraph(folder, threads=1), node, described["online"], probe)


def one_percent(array: np.ndarray) -> None:
    array.reshape(-1)[np.abs(array).argmax()] *= 1.01


def one_percent_of_a_middling_one(array: np.ndarray) -> None:
    flat = np.abs(array).reshape(-1)
    array.reshape(-1)[flat.argsort()[len(flat) // 2]] *= 1.01


def wrong_sign(array: np.ndarray) -> None:
    array.reshape(-1)[5] *= -1


def all_signs(array: np.ndarray) -> None:
    array[:] = 1


def zero(array: np.ndarray) -> None:
    array[:] = 0


def next_row(array: np.ndarray) -> None:
    array[:] = np.roll(array, 1, axis=0)


def not_a_number(array: np.ndarray) -> None:
    array.reshape(-1)[3] = np.nan


DOWN_SITE = "model.layers.1.mlp.down_proj.input.t"
PACK = "model.layers.1.self_attn.qkv_proj"
DAMAGES = [
    (f"{SITE}.directions", one_percent),
    (f"{SITE}.directions", one_percent_of_a_middling_one),
    (f"{SITE}.directions", wrong_sign),
    (f"{SITE}.directions", not_a_number),
    (f"{SITE}.directions", zero),
    (f"{SITE}.signs", wrong_sign),
    (f"{SITE}.signs", all_signs),
    ("hadamard.matrix_64", wrong_sign),
    (f"{PACK}.side", one_percent),
    (f"{PACK}.side", one_percent_of_a_middling_one),
    (f"{PACK}.side", next_row),
    (f"{PACK}.side", zero),
    (f"{PACK}.low_rank_down", one_percent_of_a_middling_one),
    (f"{PACK}.low_rank_up_1", one_percent_of_a_middling_one),
    (f"{PACK}.low_rank_up_2", zero),
    (f"{DOWN_SITE}.factors", one_percent_of_a_middling_one),
    (f"{DOWN_SITE}.directions", one_percent_of_a_middling_one),
    (f"{DOWN_SITE}.signs", wrong_sign),
]


@pytest.mark.parametrize(("name", "change"), DAMAGES)
def test_damaged_numbers_are_caught(
    made: Made, tmp_path: Path, name: str, change: Callable[[np.ndarray], None]
) -> None:
    copy = damaged(made[0], tmp_path / "p", values(made[0], name, change))
    node = DOWN if name.startswith(DOWN_SITE) else QKV
    assert not error_of(made, copy, node) <= TOLERANCE
    assert error_of(made, made[0], node) <= TOLERANCE / 2


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def around_the_side_product(model: onnx.ModelProto) -> None:
    """Attention reads the codes' product alone; the additions stay, but nobody reads them."""
    attention = node_of(model, "/model/layers.1/self_attn/GroupQueryAttention")
    attention.input[0] = f"{QKV}/MatMulNBits/output_0"


def one_addition_left_out(model: onnx.ModelProto) -> None:
    """The correction is added to the product, the side product is dropped."""
    node_of(model, f"{QKV}/low_rank/Add").input[0] = f"{QKV}/MatMulNBits/output_0"


def around_the_transform(model: onnx.ModelProto) -> None:
    """The codes are multiplied with the untransformed input."""
    lowered = node_of(model, f"{QKV}/MatMulNBits")
    lowered.input[0] = node_of(model, "/model/layers.1/self_attn/q_proj/input/t/side/MatMul").input[0]


def subtracted(model: onnx.ModelProto) -> None:
    """The projection is added instead of taken away."""
    node_of(model, "/model/layers.1/self_attn/q_proj/input/t/rest/Sub").op_type = "Add"


def not_projected(model: onnx.ModelProto) -> None:
    """The rotation reads the input with its directions still in it."""
    turned = node_of(model, "/model/layers.1/self_attn/q_proj/input/t/signs/Mul")
    turned.input[0] = node_of(model, "/model/layers.1/self_attn/q_proj/input/t/side/MatMul").input[0]


def other_site(model: onnx.ModelProto) -> None:
    """The side product reads another layer's directions."""
    strange = "/model/layers.0/self_attn/q_proj/input/t/side/MatMul/output_0"
    node_of(model, f"{QKV}/side/FusedMatMul").input[0] = strange


@pytest.mark.parametrize(
    "change",
    [around_the_side_product, one_addition_left_out, around_the_transform, subtracted, not_projected, other_site],
)
def test_other_wiring_is_caught(made: Made, tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    copy = damaged(made[0], tmp_path / "p", change)
    try:
        check_surroundings(PackageGraph(copy), made[2]["nodes"])
        error = error_of(made, copy, QKV)
    except InputRefused as refusal:
        assert "layers.1/self_attn" in str(refusal)
    else:
        assert not error <= TOLERANCE


def test_a_damaged_package_fails_as_a_whole(made: Made, tokens: np.ndarray, tmp_path: Path) -> None:
    copy = damaged(made[0], tmp_path / "p", values(made[0], f"{SITE}.signs", wrong_sign))
    result = verified((copy, *made[1:]), tokens)
    assert "fail" in [check.outcome for check in result.checks if check.name == "online"]
    assert "q_proj" in result.failure or "qkv_proj" in result.failure


@pytest.mark.parametrize("change", ["left out", "another output"])
def test_the_description_must_be_the_checkpoints(made: Made, tokens: np.ndarray, change: str) -> None:
    folder, checkpoint, details = made
    name = f"{QKV}/MatMulNBits"
    node = dict(details["nodes"][name])
    if change == "left out":
        del node["online"]
    else:
        node["online"] = {**node["online"], "output": node["online"]["product"]}
    nodes = {**details["nodes"], name: node}
    if change == "left out":
        with pytest.raises(InputRefused, match="qkv_proj"):
            verified((folder, checkpoint, {"nodes": nodes}), tokens)
    else:
        result = verified((folder, checkpoint, {"nodes": nodes}), tokens)
        assert "online" in result.failure
