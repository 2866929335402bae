"""GGUF files, written with the gguf package, come out as the model they were made from; damaged ones are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.errors import InputRefused, QtoolError
from qtool.quantize.architectures import ARCHITECTURES, tensor_templates
from qtool.quantize.architectures.shapes import gguf_name, tensor_name
from qtool.quantize.inputs import open_model
from qtool.quantize.inputs.gguf_config import llama3_divisors

Kind = gguf.GGMLQuantizationType
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What the conversion to GGUF does to a rotary projection: row s × D/2 + i of a head becomes row 2i + s."""
    size = rows.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(
    path: Path, family: str = "llama", *, kind: Kind = Kind.F32, tied: bool = True, seed: int = 0, **extra: Any
) -> dict[str, np.ndarray]:
    """Write a random model; returns its tensors by Hugging Face name, as the stored codes have them."""
    config = {"model_type": family, "tie_word_embeddings": tied, **SIZES}
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, family)
    write_metadata(writer, extra)
    truth: dict[str, np.ndarray] = {}
    from qtool.quantize.architectures import tensor_shapes

    shapes = tensor_shapes(config)
    for template, index in tensor_templates(config):
        name, stored = tensor_name(ARCHITECTURES[family], template, index), gguf_name(template, index)
        values = rng.standard_normal(shapes[name]).astype(np.float32)
        chosen = kind if values.ndim == 2 else Kind.F32
        raw = gguf.quants.quantize(values, chosen)
        truth[name] = gguf.quants.dequantize(raw, chosen).reshape(values.shape)
        if family == "llama" and template.rotary_rows:
            raw = interleave(raw, shapes[name][0] // SIZES["head_dim"])
        writer.add_tensor(stored, raw, raw_dtype=chosen)
    for name, array in extra.get("tensors", {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def write_metadata(writer: gguf.GGUFWriter, extra: dict[str, Any]) -> None:
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_key_length(SIZES["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(extra.get("theta", 50000.0))
    tokens = [*sorted(gguf_alphabet()), "he", "the", "<bos>", "<eos>"]
    writer.add_tokenizer_model(extra.get("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(extra.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3, 3])
    writer.add_token_merges(["h e", "t he"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    for name, call in extra.get("metadata", {}).items():
        getattr(writer, name)(*call)


def gguf_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_and_config_come_back(family: str, tied: bool, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "m.gguf", family, tied=tied)
    model = open_model(str(tmp_path / "m.gguf"))
    assert list(model.names()) == sorted(truth)
    for name, array in truth.items():
        np.testing.assert_array_equal(model.read(name), array, err_msg=name)
        assert model.stored_dtype(name) == "F32"
    expected = {"model_type": family, "tie_word_embeddings": tied, "bos_token_id": 258, "eos_token_id": 259, **SIZES}
    assert {key: model.config[key] for key in expected} == expected
    assert model.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}


def test_the_rows_of_a_llama_projection_give_the_same_rotary_attention(tmp_path: Path) -> None:
    """GGUF rotates neighbouring rows, Hugging Face rows half a head apart: the scores must be the same."""
    truth = write_gguf(tmp_path / "m.gguf")
    model = open_model(str(tmp_path / "m.gguf"))
    name, size = "model.layers.0.self_attn.q_proj.weight", SIZES["head_dim"]
    x = np.random.default_rng(1).standard_normal(SIZES["hidden_size"])
    angle = 3.0 * 50000.0 ** (-np.arange(size // 2) * 2 / size)
    q = model.read(name)[:size] @ x
    low, high = q[: size // 2], q[size // 2 :]
    halves = np.stack([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)])
    stored = interleave(truth[name], SIZES["num_attention_heads"])[:size] @ x
    even, odd = stored[0::2], stored[1::2]
    pairs = np.stack([even * np.cos(angle) - odd * np.sin(angle), odd * np.cos(angle) + even * np.sin(angle)])
    np.testing.assert_allclose(halves, pairs, rtol=1e-12)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_every_kind_dequantizes_exactly_and_is_named(kind: Kind, tmp_path: Path) -> None:
    truth = write_gguf(tmp_path / "m.gguf", kind=kind)
    model = open_model(str(tmp_path / "m.gguf"))
    for name, array in truth.items():
        np.testing.assert_array_equal(model.read(name), array, err_msg=name)
    stored = model.stored_dtype("model.layers.0.mlp.up_proj.weight")
    assert stored == (kind.name if kind in (Kind.F16, Kind.BF16) else "F32")
    assert any(kind.name in note for note in model.notes) == (stored == "F32")


def test_chunks_of_rows_equal_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_1)
    monkeypatch.setattr("qtool.quantize.inputs.gguf_store.CHUNK_BYTES", 300)
    model = open_model(str(tmp_path / "m.gguf"))
    np.testing.assert_array_equal(model.read("model.embed_tokens.weight"), truth["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_some_rows_equal_those_of_the_whole(kind: Kind, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", kind=kind)
    source = open_model(str(tmp_path / "model.gguf"))
    for name in source.names():  # projections whose rows are stored in another order, and vectors, among them
        whole = source.read(name)
        assert np.array_equal(source.read_rows(name, 3, 17), whole[3:17]), name


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequency_factors_become_parameters(factor: float, tmp_path: Path) -> None:
    divisors = llama3_divisors(500000.0, SIZES["head_dim"], factor).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", theta=500000.0, tensors={"rope_freqs.weight": divisors})
    rope = open_model(str(tmp_path / "m.gguf")).config["rope_parameters"]
    assert rope["rope_type"] == "llama3" and rope["factor"] == factor


def test_llama3_divisors_are_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope: dict[str, Any] = {"rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "factor": 8.0}
    rope["rope_type"] = "llama3"
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, max_position_embeddings=2**17, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / scaled.numpy(), llama3_divisors(500000.0, 128, 8.0), rtol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown frequency factors": ({"tensors": {"rope_freqs.weight": np.full(16, 7, np.float32)}}, "rope_freqs.weight"),
    "yarn": ({"metadata": {"add_rope_scaling_type": (gguf.RopeScalingType.YARN,)}}, "rope.scaling.type"),
    "experts": ({"metadata": {"add_expert_count": (8,)}}, "expert_count"),
    "partial rotary": ({"metadata": {"add_rope_dimension_count": (16,)}}, "rope.dimension_count"),
    "value heads of another size": ({"metadata": {"add_value_length": (16,)}}, "attention.value_length"),
    "extra tensor": ({"tensors": {"blk.0.attn_qkv.weight": np.zeros((4, 4), np.float32)}}, "blk.0.attn_qkv.weight"),
    "integer tensor": ({"tensors": {"rope_freqs.weight": np.zeros(16, np.int32)}}, "I32"),
    "unknown pre-tokenizer": ({"pre": "tekken"}, "tokenizer.json beside"),
    "sentencepiece": ({"tokenizer_model": "llama"}, "tokenizer.json beside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_over_is_refused(name: str, tmp_path: Path) -> None:
    extra, words = REFUSED[name]
    write_gguf(tmp_path / "m.gguf", **extra)
    with pytest.raises(InputRefused, match=words.replace(".", r"\.")):
        open_model(str(tmp_path / "m.gguf"))


def test_other_architectures_list_the_known_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputRefused, match="supported: llama, qwen2, qwen3"):
        open_model(str(tmp_path / "m.gguf"))


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=Kind.F16)
    model = open_model(str(tmp_path / "m.gguf"))
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[-2:] = np.array([np.nan], np.float16).tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    last = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(InputRefused, match="changed while"):
        model.read(last)
    with pytest.raises(InputRefused, match=f"{last}: holds nan"):
        open_model(str(tmp_path / "m.gguf")).read(last)


def test_a_tokenizer_beside_the_file_wins(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    write_gguf(tmp_path / "m.gguf", pre="unheard-of")
    beside = (tiny_model() / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(beside)
    assert open_model(str(tmp_path / "m.gguf")).tokenizer_files == {"tokenizer.json": beside}


# --- damage, on bytes ---


def pack(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def start(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str = "t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return pack(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = pack("general.architecture") + struct.pack("<I", 8) + pack("llama")
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic": (b"GGML" + b"\0" * 60, "not a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 1": (start(0, 0, 1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "counts": (start(2**40, 2**40), "claims"),
    "head cut": (start(1, 1)[:-3], "truncated"),
    "string too long": (start(0, 1) + struct.pack("<Q", 2**62), "string of"),
    "key no UTF-8": (start(0, 1) + struct.pack("<Q", 1) + b"\xff", "UTF-8"),
    "value type": (start(0, 1) + pack("k") + struct.pack("<I", 99), "unknown value type"),
    "array of arrays": (start(0, 1) + pack("k") + struct.pack("<IIQ", 9, 9, 1), "array of type 9"),
    "array length": (start(0, 1) + pack("k") + struct.pack("<IIQ", 9, 4, 2**61), "truncated"),
    "string array length": (start(0, 1) + pack("k") + struct.pack("<IIQ", 9, 8, 2**61), "claims"),
    "duplicate key": (start(0, 2) + ARCHITECTURE * 2, "given twice"),
    "duplicate tensor": (start(2, 0) + tensor() * 2, "duplicate tensor"),
    "no dimension": (start(1, 0) + tensor(dims=()), "0 dimensions"),
    "too many dimensions": (start(1, 0) + tensor(dims=(1,) * 5), "5 dimensions"),
    "empty dimension": (start(1, 0) + tensor(dims=(0,)), "impossible shape"),
    "shape overflows": (start(1, 0) + tensor(dims=(2**40, 2**40)), "impossible shape"),
    "type": (start(1, 0) + tensor(kind=999), "ggml type 999"),
    "row of part blocks": (start(1, 0) + tensor(dims=(33,), kind=2), "not a multiple"),
    "offset": (start(1, 0) + tensor(offset=32) + b"\0" * 200, "offset 32"),
    "overlap": (start(2, 0) + tensor("a") + tensor("b") + b"\0" * 200, "offset 0"),
    "data cut": (start(1, 0) + tensor() + b"\0" * 8, "truncated"),
    "alignment": (
        start(0, 1) + pack("general.alignment") + struct.pack("<II", 4, 3), "general.alignment"),
    "no architecture": (start(0, 0), "general.architecture"),
    "no tensors": (start(0, 1) + ARCHITECTURE, "token_embd.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    data, words = DAMAGED[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputRefused, match=words):
        open_model(str(tmp_path / "m.gguf"))


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_changed_byte_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "good.gguf"
    if not path.exists():
        write_gguf(path)
    good = path.read_bytes()
    head = 6000
    position = data.draw(st.integers(0, head))
    changed = good[:position] + data.draw(st.binary(min_size=1, max_size=9)) + good[position + 9 :]
    (tmp_path / "bad.gguf").write_bytes(changed)
    try:
        open_model(str(tmp_path / "bad.gguf"))
    except QtoolError as error:
        assert error.exit_code == 3 and json.dumps(str(error))


def test_every_family_with_a_gguf_name_is_tested() -> None:
    names = [name for row in ARCHITECTURES.values() for name in row.gguf_architectures]
    assert names == ["llama", "qwen2", "qwen3"]
