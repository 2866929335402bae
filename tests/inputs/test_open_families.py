"""Every family as its published checkpoints store it: other names and packed experts come out as the network's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.errors import InputRefused
from qtool.quantize.architectures import ARCHITECTURES, tensor_shapes
from qtool.quantize.inputs import open_model
from qtool.quantize.inputs.regular_file import RegularFile

NEW = [name for name, row in ARCHITECTURES.items() if not row.quantizable]
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_equal_what_transformers_loads(
    family: str, tied: bool, tiny_model: Callable[..., Path], unpacked_parameters: Callable[[Any], dict[str, Any]]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family, tied=tied)
    model = open_model(str(folder))
    truth = unpacked_parameters(AutoModelForCausalLM.from_pretrained(folder))
    assert list(model.names()) == sorted(truth)
    for name, tensor in truth.items():
        read = model.read(name)
        assert read.dtype == np.float32 and read.flags.c_contiguous and read.flags.writeable
        np.testing.assert_array_equal(read, tensor.detach().numpy(), err_msg=name)
    assert model.float_bytes == 4 * sum(tensor.numel() for tensor in truth.values())
    assert f"{ARCHITECTURES[family].spine.embedding}.weight" in model.notes[0]


@pytest.mark.parametrize("family", NEW)
def test_the_checked_config_builds_a_network_that_computes_the_same(
    family: str, tiny_model: Callable[..., Path]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_model(family)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = AutoModelForCausalLM.from_config(AutoConfig.for_model(**open_model(str(folder)).config)).eval()
    assert type(ours).__name__ == ARCHITECTURES[family].head_class
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        logits = ours(tokens).logits
        assert torch.equal(logits, theirs(tokens).logits)
    assert torch.isfinite(logits).all() and logits.std() > 0.1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_packed_by_transformers_equal_experts_apart(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    apart = open_model(str(folder))
    values = {name: apart.read(name) for name in apart.names()}

    def pack(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        for block in range(2):
            at = f"model.layers.{block}.mlp.experts"
            pairs = [
                np.concatenate([values[f"{at}.{e}.{half}_proj.weight"] for half in ("gate", "up")]) for e in range(4)
            ]
            tensors[f"{at}.gate_up_proj"] = np.stack(pairs)
            tensors[f"{at}.down_proj"] = np.stack([values[f"{at}.{e}.down_proj.weight"] for e in range(4)])

    edit_tensors(folder, pack)
    packed = open_model(str(folder))
    assert packed.names() == apart.names()
    for name, value in values.items():
        np.testing.assert_array_equal(packed.read(name), value, err_msg=name)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_slice_of_narrow_floats_is_exact(
    dtype: str, tiny_model: Callable[..., Path], pack_safetensors: Callable[..., bytes]
) -> None:
    import ml_dtypes
    from safetensors.numpy import load_file

    folder = tiny_model("gpt_oss")
    kind = np.float16 if dtype == "F16" else ml_dtypes.bfloat16
    narrow = {name: array.astype(kind) for name, array in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").write_bytes(pack_safetensors(narrow, dtype))
    model = open_model(str(folder))
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.gate_up_proj"
        assert model.stored_dtype(f"{name}.weight") == dtype
        np.testing.assert_array_equal(model.read(f"{name}.weight"), narrow[GATE_UP][expert].T.astype(np.float32))
        bias = narrow[f"{GATE_UP}_bias"][expert].astype(np.float32)
        np.testing.assert_array_equal(model.read(f"{name}.bias"), bias)


def test_one_expert_is_read_without_the_others(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(tiny_model("gpt_oss")))
    counts: list[int] = []
    whole = RegularFile.read_into

    def count(self: RegularFile, out: Any, start: int) -> None:
        counts.append(len(out))
        whole(self, out, start)

    monkeypatch.setattr(RegularFile, "read_into", count)
    model.read("model.layers.0.mlp.experts.3.down_proj.weight")
    assert counts == [64 * 96 * 4]


@pytest.mark.parametrize(
    ("family", "stored", "missing"),
    [
        ("mixtral", "1.block_sparse_moe.experts.2.w3.weight", "1.mlp.experts.2.up_proj.weight"),
        ("qwen3_moe", "0.mlp.experts.3.down_proj.weight", "0.mlp.experts.3.down_proj.weight"),
        ("mixtral", "0.block_sparse_moe.gate.weight", "0.mlp.gate.weight"),
        ("gpt_oss", "1.mlp.experts.down_proj_bias", "1.mlp.experts.0.down_proj.bias"),
    ],
)
def test_a_missing_expert_is_refused_by_name(
    family: str, stored: str, missing: str, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model(family)
    edit_tensors(folder, lambda tensors: tensors.pop(f"model.layers.{stored}"))
    with pytest.raises(InputRefused, match=f"model.layers.{missing}: is missing from the weights"):
        open_model(str(folder))


def test_an_expert_stored_twice_is_refused(tiny_model: Callable[..., Path]) -> None:
    folder, name = tiny_model("mixtral"), "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.mlp.experts.0.down_proj.weight": tensors[name]})
    )
    with pytest.raises(InputRefused, match=f"{name}: is not part of the architecture"):
        open_model(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({GATE_UP: tensors[GATE_UP].transpose(0, 2, 1)}),
        lambda tensors: tensors.update({GATE_UP: tensors[GATE_UP][:3]}),
        lambda tensors: tensors.update({GATE_UP: tensors[GATE_UP][0]}),
    ],
    ids=["transposed", "an expert short", "one expert"],
)
def test_a_packed_tensor_of_a_wrong_shape_is_refused(change: Any, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("gpt_oss")
    edit_tensors(folder, change)
    with pytest.raises(InputRefused, match=f"{GATE_UP}: has shape .* asks for \\(4, 64, 192\\)"):
        open_model(str(folder))


def test_a_packed_tensor_of_integers_is_refused(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("gpt_oss")
    edit_tensors(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].astype(np.int32)}))
    with pytest.raises(InputRefused, match="is stored as I32"):
        open_model(str(folder))


def test_mxfp4_experts_are_refused_with_the_way_out(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("gpt_oss")

    def quantize(tensors: dict[str, Any]) -> None:
        tensors[f"{DOWN}_blocks"] = np.zeros((4, 64, 3, 16), np.uint8)
        tensors[f"{DOWN}_scales"] = np.zeros((4, 64, 3), np.uint8)
        del tensors[DOWN]

    edit_tensors(folder, quantize)
    with pytest.raises(InputRefused, match=r"_blocks: the model is already quantized.*bfloat16"):
        open_model(str(folder))
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(InputRefused, match=r"quantization_config: the model is already quantized.*bfloat16"):
        open_model(str(folder))


def test_an_older_name_of_the_embedding_is_read(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("mamba")
    value = open_model(str(folder)).read("backbone.embeddings.weight")
    edit_tensors(
        folder, lambda tensors: tensors.update({"backbone.embedding.weight": tensors.pop("backbone.embeddings.weight")})
    )
    model = open_model(str(folder))
    assert list(model.names()) == sorted(tensor_shapes(model.config))
    np.testing.assert_array_equal(model.read("backbone.embeddings.weight"), value)


def test_a_tied_head_that_is_stored_too_is_left_out_under_every_spine(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("opt")
    edit_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.decoder.embed_tokens.weight"]})
    )
    model = open_model(str(folder))
    assert "lm_head.weight" not in model.names()
    assert any("equal to model.decoder.embed_tokens.weight" in note for note in model.notes)


@pytest.mark.parametrize("infinity", ["Infinity", '{"__float__": "Infinity"}', "1e39"])
def test_no_limit_on_the_time_step_in_every_spelling(infinity: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("mamba2")
    text = (folder / "config.json").read_text()
    plain = open_model(str(folder)).config
    (folder / "config.json").write_text(text[:-1] + f', "time_step_limit": [0.0, {infinity}]}}')
    assert open_model(str(folder)).config == plain
    json.dumps(plain, allow_nan=False)


def test_infinity_and_nan_are_refused_elsewhere_in_a_config(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("mamba2")
    text = (folder / "config.json").read_text()
    for word, where in (("Infinity", "layer_norm_epsilon"), ("NaN", "config.json"), ("-Infinity", "config.json")):
        (folder / "config.json").write_text(text[:-1] + f', "layer_norm_epsilon": {word}}}')
        with pytest.raises(InputRefused, match=where):
            open_model(str(folder))
