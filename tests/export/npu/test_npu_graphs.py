"""The static graphs compute the model: in float exactly, quantized within the activations' own error."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from qtool.errors import InputRefused, UsageError
from qtool.kernels.pack import unpack_int4
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.artifacts.static_graphs import StaticShapes
from qtool.quantize.export.onnx.npu.decoder import Decoder
from qtool.quantize.export.onnx.npu.linear_weights import LinearWeights, check_schemes
from qtool.quantize.export.onnx.npu.model_shape import model_shape
from qtool.quantize.export.onnx.npu.record import FloatGraphs
from qtool.quantize.export.onnx.npu.rotary import rotary_tables
from qtool.quantize.inputs import open_model
from qtool.runtime.npu import NpuSession
from qtool.runtime.npu.rules import check_file

CHUNK, CONTEXT = 8, 32


def reference(source, ids):
    with torch.no_grad():
        return load_network(source)(torch.from_numpy(ids[None])).logits[0].numpy()


def float_graphs(source, folder, norm, read=None):
    shape = model_shape(source.config, chunk=CHUNK, context=CONTEXT)
    decoder = Decoder(
        source=source,
        shape=shape,
        static=shape.static(CHUNK, CONTEXT),
        tables=rotary_tables(source, CONTEXT),
        norm=norm,
    )
    return FloatGraphs(decoder, read or LinearWeights(source).read_float, folder, threads=1)


@pytest.mark.parametrize(("family", "norm"), [("llama", "l2"), ("mistral", "rms"), ("qwen2", "rms"), ("qwen3", "rms")])
def test_the_float_graphs_compute_the_model(family, norm, tiny_model, tmp_path):
    model = open_model(str(tiny_model(family, tied=family != "qwen2")))
    ids = np.random.default_rng(0).integers(0, 256, 29)  # three chunks and five tokens that come one by one
    (tmp_path / "graphs").mkdir()
    got, _ = float_graphs(model, tmp_path / "graphs", norm).run(ids)
    wanted = reference(model, ids)
    # l2 leaves ε = 1e-5 out, against mean squares of 0.006 and more.
    assert np.abs(got - wanted).max() <= (2e-3 if norm == "l2" else 1e-5) * np.abs(wanted).max()


def test_sixteen_bit_activations_cost_little_and_decode_equals_prefill(
    llama, llama_package, random_windows, tmp_path
):
    ids = random_windows(1)[0]  # of the calibration: nothing saturates
    weights = LinearWeights(llama)
    exact, _ = float_graphs(llama, tmp_path, "l2", lambda module: weights.read(module).dequantize()).run(ids)
    with NpuSession(llama_package, threads=1) as session:
        whole = session.prefill(ids[None])[0]
        session.reset()
        steps = [session.prefill(ids[None, :11])[0]]  # one chunk, and three tokens in a padded one
        steps += [session.decode(ids[i : i + 1]) for i in range(11, CONTEXT)]
        assert session.max_length == CONTEXT
        with pytest.raises(UsageError, match="cache holds 32"):
            session.decode(ids[:1])
    spread = exact.std()
    assert 0 < np.abs(whole - exact).max() <= 0.005 * spread
    # The same codes by another order of sums: a few may flip.
    assert np.abs(np.concatenate(steps) - whole).max() <= 0.005 * spread


def test_eight_bit_activations_keep_their_islands(llama, llama_package, npu_package, random_windows):
    folder, details = npu_package(llama, activations="uint8", largest_error=100)
    assert details["npu"]["measured_islands"] == {}
    counts = details["npu"]["node_types"]
    assert counts["uint8"] > 20 and counts["uint16"] > 20
    for name in ("prefill", "decode"):
        assert check_file(folder / f"{name}.onnx") == []
    ids = random_windows(1)[0]
    with NpuSession(folder, threads=1) as coarse, NpuSession(llama_package, threads=1) as fine:
        wanted, got = fine.prefill(ids[None]), coarse.prefill(ids[None])
    assert 0.001 * wanted.std() < np.abs(got - wanted).max() <= 0.5 * wanted.std()
    _, held = npu_package(llama, activations="uint8", largest_error=100, islands=("*.down_proj.output",))
    assert held["npu"]["node_types"]["uint16"] == counts["uint16"] + llama.config["num_hidden_layers"]


def test_an_eight_bit_cache_halves_its_bytes_and_costs_little(llama, llama_package, npu_package, random_windows):
    folder, details = npu_package(llama, cache="uint8")
    assert details["npu"]["node_types"]["uint8"] == 2 * llama.config["num_hidden_layers"]
    for name in ("prefill", "decode"):
        assert check_file(folder / f"{name}.onnx") == []
        model = onnx.load(str(folder / f"{name}.onnx"), load_external_data=False)
        cached = [v for v in (*model.graph.input, *model.graph.output) if v.name.startswith(("past", "present"))]
        assert len(cached) == 8 and {v.type.tensor_type.elem_type for v in cached} == {onnx.TensorProto.UINT8}
    ids = random_windows(1)[0]
    with NpuSession(folder, threads=1) as coarse, NpuSession(llama_package, threads=1) as fine:
        wanted, got = fine.prefill(ids[None]), coarse.prefill(ids[None])
        coarse.reset()
        steps = np.concatenate([coarse.decode(ids[i : i + 1]) for i in range(CONTEXT)])
    assert 0.0005 * wanted.std() < np.abs(got - wanted).max() <= 0.2 * wanted.std()
    assert np.abs(steps - got[0]).max() <= 0.05 * wanted.std()


def test_a_prefix_stands_before_every_text_and_outside_the_ranges(tiny_model, npu_package, random_windows, tmp_path):
    folder = tiny_model("llama", seed=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 5] = 3000.0  # a token that is massive wherever it stands
    save_file(tensors, folder / "model.safetensors")
    model = open_model(str(folder))
    windows = random_windows()
    windows[windows == 7] = 8
    windows = windows[:, : CONTEXT - CHUNK]
    package, details = npu_package(model, prefix=(7,), windows=windows)
    assert details["npu"]["prefix"] == [7]
    ranges = json.loads((package / "ranges.json").read_bytes())
    assert ranges["model.layers.1.output"][1] < 100
    ids = windows[0]
    wanted = reference(model, np.concatenate([[7], ids]))[1:]
    with NpuSession(package, threads=1) as session:
        got = session.prefill(ids[None])[0]
        assert session.max_length == CONTEXT - 1
        session.reset()
        steps = np.concatenate([session.decode(ids[i : i + 1]) for i in range(len(ids))])
    plain, _ = npu_package(model, windows=np.concatenate([np.full((3, 1), 7), windows], axis=1))
    with NpuSession(plain, threads=1) as session:
        without = session.prefill(np.concatenate([[7], ids])[None])[0, 1:]
    error, error_without = (np.abs(x - wanted).mean() / wanted.std() for x in (got, without))
    # The table of embeddings has the massive row in either case: what differs is everything behind it.
    assert error < 0.01 and error_without > 1.5 * error
    assert json.loads((plain / "ranges.json").read_bytes())["model.layers.1.output"][1] > 2000
    assert np.abs(steps - got).max() <= 0.02 * wanted.std()
    with pytest.raises(UsageError, match="outside the vocabulary"):
        npu_package(model, prefix=(320,), windows=windows)


def initializers(path):
    model = onnx.load(str(path))
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_the_file_holds_the_checkpoint_s_codes(llama, static_checkpoint, npu_package):
    four, eight = layer_scheme("W4A16", group_size="channel"), layer_scheme("W8A16")
    blocks = layer_scheme("W4A16", group_size=32)

    def scheme_of(module):
        if module == "lm_head" or module.endswith("v_proj"):
            return eight
        return None if module.endswith("up_proj") else blocks if module.endswith("o_proj") else four

    checkpoint = static_checkpoint(llama, scheme_of)
    folder, details = npu_package(checkpoint)
    assert details["npu"]["rounded_at_export"] == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    stored = initializers(folder / "decode.onnx")
    for module, scheme in checkpoint.schemes.items():
        tensor = checkpoint.quantized(module)
        codes = numpy_helper.to_array(stored[f"{module}.weight.codes"]).astype(np.int32)
        wanted = tensor.codes.numpy().T.astype(np.int32) - scheme.weight.format.zero_code
        assert np.array_equal(codes, wanted)
        scales = numpy_helper.to_array(stored[f"{module}.weight.scale"])
        assert np.array_equal(scales, tensor.scale.numpy().T if scheme == blocks else tensor.scale.numpy()[:, 0])
    for name in ("prefill", "decode"):
        assert check_file(folder / f"{name}.onnx") == []
    # Read without ONNX: 4-bit codes lie two a byte, the first in the low nibble.
    entries = {e.key: e.value for e in onnx.load(str(folder / "decode.onnx"), load_external_data=False).graph.
               initializer[[t for t in stored].index("model.layers.0.self_attn.q_proj.weight.codes")].external_data}
    raw = np.fromfile(folder / "npu.data", np.uint8)[int(entries["offset"]) :][: int(entries["length"])]
    nibbles = unpack_int4(torch.from_numpy(raw.copy())[None], columns=64 * 64)[0].reshape(64, 64).numpy()
    signed = (nibbles.astype(np.int32) ^ 8) - 8
    assert np.array_equal(signed.T + 8, checkpoint.quantized("model.layers.0.self_attn.q_proj").codes.numpy())


def test_static_int8_inputs_keep_the_scale_they_were_scored_with(llama, static_checkpoint, npu_package):
    scheme = layer_scheme("W8A8", activation="per_tensor")
    checkpoint = static_checkpoint(llama, lambda module: scheme if module.endswith("down_proj") else None, 0.03)
    folder, details = npu_package(checkpoint)
    stored = initializers(folder / "prefill.onnx")
    name = "model.layers.1.mlp.down_proj.input.uint8"
    assert numpy_helper.to_array(stored[f"{name}.scale"]) == np.float32(0.03)
    assert numpy_helper.to_array(stored[f"{name}.zero_point"]) == 128
    assert details["npu"]["node_types"]["uint8"] == 2
    assert check_file(folder / "prefill.onnx") == []


REFUSED = [
    ("W4A8", {"group_size": 32}, "static activations per tensor", "W8A16"),
    ("W4A16", {"group_size": 32, "symmetric": False}, "symmetric weights", "--asymmetric"),
    ("W8A8", {"group_size": 32, "activation": "per_tensor"}, "16-bit inputs only", "--group-size channel"),
    ("W4A16", {"group_size": 128}, "divide 64 inputs", "--group-size channel"),
]


@pytest.mark.parametrize(("name", "options", "why", "remedy"), REFUSED)
def test_arithmetic_without_a_static_form_is_refused(name, options, why, remedy, llama, static_checkpoint):
    scheme = layer_scheme(name, **options)
    static = scheme.input is not None and not scheme.input.dynamic
    checkpoint = static_checkpoint(llama, lambda m: scheme if m.endswith("q_proj") else None, 0.1 if static else None)
    with pytest.raises(UsageError, match=why) as refused:
        check_schemes(checkpoint)
    assert "q_proj" in str(refused.value) and remedy in str(refused.value)


CONFIGS = [
    ({"model_type": "gemma2"}, {}, InputRefused, "dense decoders only"),
    ({"hidden_act": "gelu"}, {}, InputRefused, "silu"),
    ({"sliding_window": 16}, {}, InputRefused, "--context 16"),
    ({}, {"chunk": 32}, UsageError, "chunk"),
    ({}, {"context": 512}, UsageError, "at most 256"),
]


@pytest.mark.parametrize(("change", "sizes", "error", "words"), CONFIGS)
def test_what_the_graphs_do_not_compute_is_refused(change, sizes, error, words, llama):
    with pytest.raises(error, match=words):
        model_shape({**llama.config, **change}, **{"chunk": CHUNK, "context": CONTEXT, **sizes})


def test_an_island_that_names_nothing_is_refused(llama, npu_package):
    with pytest.raises(UsageError, match="matches no tensor"):
        npu_package(llama, islands=("model.layers.0.mlp.downproj*",))


def test_calls_cover_every_token_once_and_never_overrun():
    shapes = StaticShapes(chunk=8, context=20, layers=1, kv_heads=1, head_dim=2, vocab_size=4)
    assert shapes.widths(20, 0) == [8, 8, 1, 1, 1, 1]
    assert shapes.widths(11, 0) == [8, 8]
    assert shapes.widths(9, 0) == [8, 1]
    assert shapes.widths(11, 0, padded=False) == [8, 1, 1, 1]
    assert shapes.widths(3, 13) == [1, 1, 1]


def test_a_repeated_export_gives_the_same_bytes(llama, llama_package, npu_package):
    folder, _ = npu_package(llama)
    for path in sorted(llama_package.iterdir()):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    settings = json.loads((folder / "npu.json").read_bytes())
    assert settings["shapes"]["context"] == CONTEXT and settings["scales"]["lm_head.output"][2] == 16
