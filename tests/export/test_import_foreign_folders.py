"""Folders that GPTQ, AWQ and compressed-tensors would have written, packed here by hand, come in code for code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from qtool.cli.import_checkpoint import command
from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.granularity import PerChannel, PerGroup, PerTensor, PerToken, PerTokenGroup

GROUP = 32


@dataclass
class Truth:
    """What a linear's weight is, before anything is packed."""

    codes: np.ndarray  # [N, K], unsigned
    zeros: np.ndarray  # [N, G], unsigned
    scale: np.ndarray  # [N, G] float16

    @property
    def weight(self) -> np.ndarray:
        repeat = -(-self.codes.shape[1] // self.zeros.shape[1])
        zeros, scale = (np.repeat(x, repeat, 1)[:, : self.codes.shape[1]] for x in (self.zeros, self.scale))
        return scale.astype(np.float32) * (self.codes.astype(np.float32) - zeros.astype(np.float32))


def truth_of(shape: tuple[int, int], rng: Any, *, bits: int, symmetric: bool, group: int) -> Truth:
    groups = 1 if group == -1 else shape[1] // group
    middle, top = 1 << (bits - 1), 1 << bits
    codes = rng.integers(1 if symmetric else 0, top, shape)
    zeros = np.full((shape[0], groups), middle) if symmetric else rng.integers(1, top - 1, (shape[0], groups))
    scale = rng.uniform(0.2, 1.5, (shape[0], groups)) / middle
    return Truth(codes, zeros, scale.astype(np.float16))


def words(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """32-bit words of codes along an axis, the first code in the lowest bits."""
    values = np.moveaxis(values, axis, 0)
    per = 32 // bits
    values = np.concatenate([values, np.zeros((-len(values) % per, *values.shape[1:]), values.dtype)])
    packed = np.zeros((len(values) // per, *values.shape[1:]), np.uint32)
    for i in range(per):
        packed |= (values[i::per].astype(np.uint32) & (2**bits - 1)) << np.uint32(bits * i)
    return np.ascontiguousarray(np.moveaxis(packed, 0, axis)).view(np.int32)


def interleaved(values: np.ndarray) -> np.ndarray:
    """AWQ's words along the last axis."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    eights = values.reshape(values.shape[0], -1, 8)[:, :, order]
    return words(eights.reshape(values.shape[0], -1), 4, 1)


def gptq(truth: Truth, *, bits: int = 4, less: int = 1, **_: Any) -> dict[str, np.ndarray]:
    columns, groups = truth.codes.shape[1], truth.zeros.shape[1]
    return {
        "qweight": words(truth.codes.T, bits, 0),
        "qzeros": words((truth.zeros - less).T, bits, 1),
        "scales": np.ascontiguousarray(truth.scale.T),
        "g_idx": (np.arange(columns) // (columns // groups)).astype(np.int32),
    }


def awq(truth: Truth, **_: Any) -> dict[str, np.ndarray]:
    return {
        "qweight": interleaved(truth.codes.T),
        "qzeros": interleaved(truth.zeros.T),
        "scales": np.ascontiguousarray(truth.scale.T),
    }


def packed(truth: Truth, *, bits: int = 4, symmetric: bool = True, **_: Any) -> dict[str, np.ndarray]:
    stored = {
        "weight_packed": words(truth.codes, bits, 1),
        "weight_shape": np.array(truth.codes.shape, np.int64),
        "weight_scale": truth.scale,
    }
    return stored if symmetric else {**stored, "weight_zero_point": words(truth.zeros, bits, 0)}


def packed_but_for_zeros(truth: Truth, **options: Any) -> dict[str, np.ndarray]:
    return {**packed(truth, **options), "weight_zero_point": (truth.zeros - 8).astype(np.int8)}


def signed(truth: Truth, *, symmetric: bool = True, **_: Any) -> dict[str, np.ndarray]:
    stored = {"weight": (truth.codes - 128).astype(np.int8), "weight_scale": truth.scale}
    return stored if symmetric else {**stored, "weight_zero_point": (truth.zeros - 128).astype(np.int8)}


def compressed_config(bits: int, symmetric: bool, layout: str, group: int = GROUP, **act: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, **act} if act else None
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
TOKEN = {"strategy": "token", "dynamic": True}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq v1 sym": (gptq, GPTQ, {}),
    "gptq v1 asym": (gptq, {**GPTQ, "sym": False, "checkpoint_format": "gptq"}, {"symmetric": False}),
    "gptq v2 sym": (gptq, {**GPTQ, "checkpoint_format": "gptq_v2"}, {"less": 0}),
    "gptq v2 asym": (gptq, {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, {"less": 0, "symmetric": False}),
    "gptq 8 bits": (gptq, {**GPTQ, "bits": 8}, {"bits": 8}),
    "gptq desc_act, groups in order": (gptq, {**GPTQ, "desc_act": True}, {}),
    "awq": (awq, AWQ, {"symmetric": False}),
    "packed": (packed, compressed_config(4, True, "pack-quantized"), {}),
    "packed asym": (packed, compressed_config(4, False, "pack-quantized"), {"symmetric": False}),
    "packed asym, zero points apart": (
        packed_but_for_zeros, compressed_config(4, False, "pack-quantized"), {"symmetric": False}
    ),
    "packed 8 bits asym": (packed, compressed_config(8, False, "pack-quantized"), {"bits": 8, "symmetric": False}),
    "packed W4A8": (packed, compressed_config(4, True, "pack-quantized", **TOKEN), {}),
    "int8 W8A8": (signed, compressed_config(8, True, "int-quantized", -1, **TOKEN), {"bits": 8, "group": -1}),
    "int8 asym": (signed, compressed_config(8, False, "int-quantized", **TOKEN), {"bits": 8, "symmetric": False}),
}  # fmt: skip


@pytest.fixture
def foreign(tiny_model, tmp_path):
    """foreign(pack, settings, symmetric=…, bits=…, group=…) -> folder, {module: Truth}, float tensors as they are."""

    def make(pack: Any, settings: dict[str, Any], *, file: str = "", **options: Any) -> tuple[Path, Any, Any]:
        base = tiny_model("qwen2", tied=False)
        rng = np.random.default_rng(5)
        values = {"bits": 4, "symmetric": True, "group": GROUP, **options}
        tensors = load_file(base / "model.safetensors")
        truths, stored = {}, {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if name.endswith("_proj.weight"):
                chosen = {key: values[key] for key in ("bits", "symmetric", "group")}
                truths[module] = truth_of(tensor.shape, rng, **chosen)
                made = pack(truths[module], **values)
                stored |= {f"{module}.{part}": array for part, array in made.items()}
                tensors[name] = truths[module].weight
            else:
                stored[name] = tensor
        folder = tmp_path / "foreign"
        folder.mkdir()
        config = json.loads((base / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config if file else {**config, "quantization_config": settings}))
        if file:
            (folder / file).write_text(json.dumps({k: v for k, v in settings.items() if k != "quant_method"}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((base / name).read_bytes())
        save_file(stored, folder / "model.safetensors")
        save_file(tensors, base / "model.safetensors")  # the same model in float: what the codes stand for
        return folder, truths, base

    return make


def qtool_import(folder: Path, output: Path, *options: str) -> None:
    CliRunner().invoke(command, [str(folder), "-o", str(output), *options], catch_exceptions=False)


def spoil(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(name)]:
        tensors[key] = change(tensors[key])
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_come_in_number_for_number(case, foreign, tmp_path) -> None:
    pack, settings, options = CASES[case]
    folder, truths, base = foreign(pack, settings, **options)
    qtool_import(folder, tmp_path / "checkpoint")
    checkpoint = QuantizedCheckpoint(tmp_path / "checkpoint")
    assert sorted(checkpoint.schemes) == sorted(truths) and len(truths) == 14
    for module, truth in truths.items():
        weight = checkpoint.quantized(module)
        assert np.array_equal(weight.codes.numpy(), truth.codes)
        assert np.array_equal(weight.scale.numpy(), truth.scale.astype(np.float32))
        if weight.zero_point is None:
            assert (truth.zeros == weight.scheme.weight.format.zero_code).all()
        else:
            assert np.array_equal(weight.zero_point.numpy(), truth.zeros)
        assert np.array_equal(weight.dequantize().numpy(), truth.weight)
    floats = load_file(base / "model.safetensors")
    for name in floats:
        assert np.array_equal(checkpoint.read(name), floats[name])


@pytest.mark.parametrize("case", ["gptq v1 asym", "gptq v2 sym", "awq", "packed", "packed asym"])
def test_onnx_of_an_import_computes_the_dequantized_model(
    case, foreign, tmp_path, source_of, export, run_logits, torch_logits, ids
) -> None:
    pack, settings, options = CASES[case]
    folder, _, base = foreign(pack, settings, **options)
    qtool_import(folder, tmp_path / "checkpoint")
    source = source_of(base)
    package, details = export(QuantizedCheckpoint(tmp_path / "checkpoint"), source)
    got, wanted = run_logits(package, ids), torch_logits(source, ids)
    assert (np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)).max() <= 1e-5
    assert details["float_modules"] == ["lm_head"]


@pytest.mark.parametrize(("file", "pack", "settings"), [("quantize_config.json", gptq, GPTQ),
                                                        ("quant_config.json", awq, AWQ)])
def test_settings_in_a_file_of_their_own(file, pack, settings, foreign, tmp_path) -> None:
    old = {"awq": {"w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"}}
    given = old.get(settings["quant_method"], settings)
    folder, truths, _ = foreign(pack, given, file=file, symmetric=pack is gptq)
    qtool_import(folder, tmp_path / "checkpoint")
    weight = QuantizedCheckpoint(tmp_path / "checkpoint").quantized("model.layers.1.mlp.down_proj")
    assert np.array_equal(weight.dequantize().numpy(), truths["model.layers.1.mlp.down_proj"].weight)


def test_activations_are_taken_from_the_folder_or_the_option(foreign, tmp_path) -> None:
    module = "model.layers.0.self_attn.k_proj"
    folder, _, _ = foreign(*CASES["int8 W8A8"][:2], **CASES["int8 W8A8"][2])
    qtool_import(folder, tmp_path / "a")
    scheme = QuantizedCheckpoint(tmp_path / "a").schemes[module]
    assert scheme.input is not None and scheme.input.granularity == PerToken() and scheme.input.dynamic
    assert scheme.weight.granularity == PerChannel()
    with pytest.raises(UsageError, match="per_token_group"):
        settings = {**CASES["int8 W8A8"][1]}
        settings["config_groups"] = {"g": {**settings["config_groups"]["group_0"], "input_activations": None}}
        (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "quantization_config": settings})
        )
        qtool_import(folder, tmp_path / "b", "--activation", "per_token_group")


def test_option_gives_int8_inputs_and_the_fast_node(foreign, tmp_path, source_of, export) -> None:
    folder, truths, base = foreign(*CASES["awq"][:2], symmetric=False)
    qtool_import(folder, tmp_path / "checkpoint", "--activation", "per_token_group")
    checkpoint = QuantizedCheckpoint(tmp_path / "checkpoint")
    scheme = checkpoint.schemes["model.layers.0.mlp.up_proj"]
    assert scheme.input is not None and scheme.input.granularity == PerTokenGroup(GROUP)
    assert scheme.weight.granularity == PerGroup(GROUP)
    codes = checkpoint.quantized("model.layers.0.mlp.up_proj").codes.numpy()
    assert np.array_equal(codes, truths["model.layers.0.mlp.up_proj"].codes)
    _, details = export(checkpoint, source_of(base))
    assert {node["accuracy_level"] for node in details["nodes"].values()} == {4}


def test_static_input_scales_come_in(foreign, tmp_path) -> None:
    settings = compressed_config(8, True, "int-quantized", -1, strategy="tensor", dynamic=False)

    def pack(truth, **options):
        return {**signed(truth), "input_scale": np.array([0.0375], np.float32)}

    folder, _, _ = foreign(pack, settings, bits=8, group=-1)
    qtool_import(folder, tmp_path / "checkpoint")
    weight = QuantizedCheckpoint(tmp_path / "checkpoint").quantized("model.layers.0.mlp.up_proj")
    assert weight.scheme.input.granularity == PerTensor() and weight.input_scale == np.float32(0.0375)


def test_first_fitting_group_is_the_most_particular(foreign, tmp_path) -> None:
    settings = compressed_config(4, True, "pack-quantized")
    everything = settings["config_groups"]["group_0"]
    down = {**everything, "targets": ["re:.*down_proj"], "input_activations": {"num_bits": 8, "type": "int", **TOKEN}}
    settings["config_groups"] = {"group_0": everything, "group_1": down}
    folder, _, _ = foreign(packed, settings)
    qtool_import(folder, tmp_path / "checkpoint")
    schemes = QuantizedCheckpoint(tmp_path / "checkpoint").schemes
    assert [m for m, s in schemes.items() if s.input] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def test_biases_of_zeros_are_left_out_and_others_refused(foreign, tmp_path) -> None:
    folder, _, _ = foreign(gptq, GPTQ)
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.mlp.up_proj.bias": np.zeros(96, np.float16)}, path)
    qtool_import(folder, tmp_path / "checkpoint")
    save_file({**load_file(path), "model.layers.0.mlp.up_proj.bias": np.ones(96, np.float16)}, path)
    with pytest.raises(InputRefused, match=r"up_proj\.bias: is not part of the architecture"):
        qtool_import(folder, tmp_path / "other")


def test_two_imports_are_the_same_bytes(foreign, tmp_path) -> None:
    folder, _, _ = foreign(gptq, GPTQ)
    qtool_import(folder, tmp_path / "a")
    qtool_import(folder, tmp_path / "b")
    digests = {QuantizedCheckpoint(tmp_path / name).digest for name in "ab"}
    assert len(digests) == 1


def scattered(index: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(index)


REFUSED = {
    "bits": ({**GPTQ, "bits": 3}, None, r"bits 3: are neither 4 nor 8"),
    "marlin": ({**GPTQ, "checkpoint_format": "marlin"}, None, "made for one kernel"),
    "dynamic": ({**GPTQ, "dynamic": {r"+:.*mlp": {"bits": 8}}}, None, "gives some layers other settings"),
    "group": ({**GPTQ, "group_size": 24}, None, "group_size 24: is none of 16, 32, 64, 128, -1"),
    "wrong group": ({**GPTQ, "group_size": 16}, None, r"g_idx: scatters|shape"),
    "unknown": ({**GPTQ, "quant_method": "quip"}, None, "quant_method 'quip': has codes that qtool cannot keep"),
    "desc_act": (GPTQ, ("g_idx", scattered), r"g_idx: scatters the groups.*static_groups"),
    "v2 said to be v1": (GPTQ, ("qzeros", lambda z: z + 0x11111111), "means 9 .*sym asks for 8.*gptq_v2"),
    "v1 said to be v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, None, "means 7 .*sym asks for 8.*written as gptq,"),
    "v1 zero of 16": (
        {**GPTQ, "sym": False}, ("qzeros", lambda z: z | 0xF), r"holds 15, which readers.*16 or for 0.*gptq_v2"
    ),
    "scales": (GPTQ, ("scales", lambda s: s * 0), "are not all finite and positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_exactly_is_refused(case, foreign, tmp_path) -> None:
    settings, change, words_ = REFUSED[case]
    folder, _, _ = foreign(gptq, settings)
    if change is not None:
        spoil(folder, *change)
    with pytest.raises(InputRefused, match=words_):
        qtool_import(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("change", "words_"),
    [
        ({"version": "gemv"}, "version 'gemv': packs the codes in another order"),
        ({"zero_point": False}, "zero_point false"),
        ({"bits": 8}, "bits 8: are not 4"),
    ],
)
def test_awq_that_is_not_gemm_is_refused(change, words_, foreign, tmp_path) -> None:
    folder, _, _ = foreign(awq, {**AWQ, **change}, symmetric=False)
    with pytest.raises(InputRefused, match=words_):
        qtool_import(folder, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("change", "words_"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: is more than codes and scales"),
        ({"transform_config": {"a": 1}}, "transform_config: is more"),
        ({"quantization_status": "frozen"}, "holds float weights"),
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized': is none of"),
        ({"config_groups": {}}, "have no group for model.layers.0.self_attn.q_proj"),
    ],
)
def test_compressed_tensors_with_more_than_codes_is_refused(change, words_, foreign, tmp_path) -> None:
    folder, _, _ = foreign(packed, {**compressed_config(4, True, "pack-quantized"), **change})
    with pytest.raises(InputRefused, match=words_):
        qtool_import(folder, tmp_path / "checkpoint")


GROUP_0 = compressed_config(4, True, "pack-quantized")["config_groups"]["group_0"]


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"num_bits": [4], "type": "int", "strategy": "group", "group_size": GROUP}},
        {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}},
        {"targets": 7},
        {"targets": ["re:("]},
    ],
)
def test_settings_of_another_type_than_any_tool_writes_are_refused(change, foreign, tmp_path) -> None:
    settings = {**compressed_config(4, True, "pack-quantized"), "config_groups": {"group_0": {**GROUP_0, **change}}}
    folder, _, _ = foreign(packed, settings)
    with pytest.raises(InputRefused, match="quantization_config: is not as compressed-tensors writes it"):
        qtool_import(folder, tmp_path / "checkpoint")


def test_settings_of_another_file_are_blamed_there(foreign, tmp_path) -> None:
    folder, _, _ = foreign(gptq, {**GPTQ, "bits": 3}, file="quantize_config.json")
    with pytest.raises(InputRefused, match=r"quantize_config\.json: bits 3: are neither"):
        qtool_import(folder, tmp_path / "checkpoint")


@pytest.mark.parametrize("change", [{"bits": [4]}, {"checkpoint_format": ["gptq"]}, {"dynamic": 1}])
def test_gptq_settings_of_another_type_are_refused(change, foreign, tmp_path) -> None:
    folder, _, _ = foreign(gptq, {**GPTQ, **change})
    with pytest.raises(InputRefused, match="quantization_config: is not as gptq writes it"):
        qtool_import(folder, tmp_path / "checkpoint")


def test_compressed_group_order_is_refused(foreign, tmp_path) -> None:
    def pack(truth, **options):
        columns = truth.codes.shape[1]
        return {**packed(truth), "weight_g_idx": scattered(np.arange(columns) // GROUP).astype(np.int32)}

    folder, _, _ = foreign(pack, compressed_config(4, True, "pack-quantized"))
    with pytest.raises(InputRefused, match="weight_g_idx: scatters the groups"):
        qtool_import(folder, tmp_path / "checkpoint")


def test_float_models_and_tied_heads_with_codes_are_refused(tiny_model, foreign, tmp_path) -> None:
    with pytest.raises(InputRefused, match=r"is not a quantized model.*qtool quantize"):
        qtool_import(tiny_model("llama"), tmp_path / "checkpoint")
    folder, _, _ = foreign(gptq, GPTQ)
    tensors = load_file(folder / "model.safetensors")
    parts = {f"lm_head.{part}": tensors[f"model.layers.0.mlp.up_proj.{part}"] for part in ("qweight", "scales")}
    save_file({**tensors, **parts}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(InputRefused, match=r"lm_head: has codes of its own.*tie_word_embeddings to false"):
        qtool_import(folder, tmp_path / "checkpoint")


def test_quantize_points_to_import(foreign) -> None:
    from qtool.quantize.inputs import open_model

    folder, _, _ = foreign(gptq, GPTQ)
    with pytest.raises(InputRefused, match="already quantized; qtool import keeps its codes"):
        open_model(str(folder))
