"""Every malformed model folder is refused with the right exit code, by a message that names the culprit, at once."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qtool.errors import MAX_MESSAGE_CHARS, QtoolError
from qtool.quantize.inputs import open_model

Spoil = Callable[[Any], None]
EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def config(**changes: Any) -> Spoil:
    def spoil(folder: Any) -> None:
        folder.config |= changes
        (folder.path / "config.json").write_text(json.dumps(folder.config))

    return spoil


def without(key: str) -> Spoil:
    def spoil(folder: Any) -> None:
        del folder.config[key]
        (folder.path / "config.json").write_text(json.dumps(folder.config))

    return spoil


def config_text(text: str | bytes) -> Spoil:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder.path / "config.json").write_bytes(data)


def weights(data: bytes) -> Spoil:
    return lambda folder: folder.write_weights(data)


def header(text: str | bytes, data: bytes = b"") -> Spoil:
    raw = text.encode() if isinstance(text, str) else text
    return weights(struct.pack("<Q", len(raw)) + raw + data)


def entry(**changes: Any) -> Spoil:
    """A header of one tensor of 4 float32 with some of its entry changed."""
    good: dict[str, Any] = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return header(json.dumps({EMBEDDING: good | changes}), b"\0" * 16)


def index_entry(value: object) -> Spoil:
    def spoil(folder: Any) -> None:
        index = folder.shard()
        index["weight_map"][EMBEDDING] = value
        folder.write_index(index)

    return spoil


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Spoil:
    def spoil(folder: Any) -> None:
        change(folder.tensors)
        folder.save()

    return spoil


def replace(name: str, make: Callable[[Any], None]) -> Spoil:
    def spoil(folder: Any) -> None:
        (folder.path / name).unlink()
        make(folder.path / name)

    return spoil


def truncate(folder: Any) -> None:
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def append(folder: Any) -> None:
    with (folder.path / "model.safetensors").open("ab") as handle:
        handle.write(b"PK\x03\x04 a second file")


def link_outside(folder: Any) -> None:
    inside, outside = folder.path / "model.safetensors", folder.path.parent / "other.safetensors"
    inside.rename(outside)
    inside.symlink_to(outside)


def linked_shard_folder(folder: Any) -> None:
    index = folder.shard()
    first = sorted(set(index["weight_map"].values()))[0]
    (folder.path / first).rename(folder.path.parent / first)
    (folder.path / first).symlink_to(f"../{first}")


def duplicate_in_two_shards(folder: Any) -> None:
    index = folder.shard()
    for name in set(index["weight_map"].values()):
        (folder.path / name).write_bytes((folder.path / sorted(index["weight_map"].values())[0]).read_bytes())


def missing_shard(folder: Any) -> None:
    index = folder.shard()
    (folder.path / index["weight_map"][EMBEDDING]).unlink()


def index_misses_tensor(folder: Any) -> None:
    index = folder.shard()
    del index["weight_map"][EMBEDDING]
    folder.write_index(index)


def index_names_unknown(folder: Any) -> None:
    index = folder.shard()
    index["weight_map"]["model.ghost.weight"] = index["weight_map"][EMBEDDING]
    folder.write_index(index)


def two_sets(folder: Any) -> None:
    folder.shard()
    folder.write_weights(b"x")


def only_file(name: str) -> Spoil:
    def spoil(folder: Any) -> None:
        (folder.path / "model.safetensors").rename(folder.path / name)

    return spoil


def different_head(folder: Any) -> None:
    folder.tensors["lm_head.weight"] = folder.tensors[EMBEDDING] + 1
    folder.save()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SHAPED = "\x1b[31mred"
CASES: dict[str, tuple[Spoil, int, str]] = {
    # shard names and links
    "index parent path": (index_entry("../other.safetensors"), 3, "plain"),
    "index nested parent path": (index_entry("a/../../other.safetensors"), 3, "plain"),
    "index absolute path": (index_entry("/etc/passwd"), 3, "plain"),
    "index url": (index_entry("https://x.org/a.safetensors"), 3, "plain"),
    "index backslash": (index_entry("..\\other.safetensors"), 3, "plain"),
    "index NUL": (index_entry("a\0.safetensors"), 3, "plain"),
    "index hidden file": (index_entry(".hidden.safetensors"), 3, "plain"),
    "index pickle": (index_entry("pytorch_model.bin"), 3, "plain"),
    "index number": (index_entry(7), 3, "plain"),
    "index list": (lambda f: (f.shard(), f.write_index([])), 3, "not an object"),
    "index empty": (lambda f: (f.shard(), f.write_index({"weight_map": {}})), 3, "weight_map"),
    "index misses a tensor": (index_misses_tensor, 3, "index"),
    "index names a ghost": (index_names_unknown, 3, "model.ghost.weight"),
    "shard missing": (missing_shard, 3, "does not exist"),
    "tensor in two shards": (duplicate_in_two_shards, 3, "also in"),
    "two sets of weights": (two_sets, 3, "two sets"),
    "weights link outside": (link_outside, 3, "symbolic link"),
    "shard links outside": (linked_shard_folder, 3, "symbolic link"),
    "weights link loop": (
        replace("model.safetensors", lambda p: p.symlink_to("model.safetensors")), 3, "loop of symbolic links"),
    "weights are a pipe": (replace("model.safetensors", os.mkfifo), 3, "not a regular file"),
    "weights are a folder": (replace("model.safetensors", lambda p: p.mkdir()), 3, "not a regular file"),
    "weights link to a device": (
        replace("model.safetensors", lambda p: p.symlink_to("/dev/zero")), 3, "not a regular file"),
    "config is a pipe": (replace("config.json", os.mkfifo), 3, "config.json"),
    "tokenizer is a pipe": (replace("tokenizer.json", os.mkfifo), 3, "tokenizer.json"),
    # files in disguise
    "empty weights": (weights(b""), 3, "empty"),
    "LFS pointer": (weights(LFS), 3, "git lfs pull"),
    "LFS tokenizer": (lambda f: (f.path / "tokenizer.json").write_bytes(LFS), 3, "git lfs pull"),
    "HTML page": (weights(b"<!DOCTYPE html><html>404</html>"), 3, "HTML"),
    "ZIP": (weights(b"PK\x03\x04" + b"x" * 100), 3, "archive"),
    "pickle": (weights(b"\x80\x02}q\x00." + b"x" * 100), 3, "pickle"),
    "gzip": (weights(b"\x1f\x8b\x08" + b"x" * 100), 3, "compressed"),
    "pickle only": (only_file("pytorch_model.bin"), 3, "convert the model to safetensors"),
    "gguf only": (only_file("model.gguf"), 3, ".gguf"),
    "odd name only": (only_file("weights.safetensors"), 3, "rename"),
    "no weights": (lambda f: (f.path / "model.safetensors").unlink(), 3, "no weights"),
    "adapter": (lambda f: (f.path / "config.json").rename(f.path / "adapter_config.json"), 3, "adapter"),
    "no config": (lambda f: (f.path / "config.json").unlink(), 3, "config.json: does not exist"),
    # headers
    "too short": (weights(b"abc"), 3, "too short"),
    "huge header": (weights(struct.pack("<Q", 2**63) + b"{}"), 3, "header of"),
    "header past the end": (weights(struct.pack("<Q", 5000) + b"{}"), 3, "truncated"),
    "header no brace": (header(" {}"), 3, "start with"),
    "header no JSON": (header("{nonsense"), 3, "not JSON"),
    "header no UTF-8": (header(b'{"\xff": 1}'), 3, "UTF-8"),
    "header NaN": (header('{"a": NaN}'), 3, "NaN"),
    "header duplicate": (header('{"a": {}, "a": {}}'), 3, "duplicate key"),
    "header bomb": (header('{"a":' + "[" * 200_000), 3, "header"),
    "header huge number": (header('{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + "]}}"), 3, "header"),
    "header entry no map": (header(json.dumps({EMBEDDING: [1]})), 3, EMBEDDING),
    "header extra field": (entry(evil=1), 3, "nothing else"),
    "header metadata": (header('{"__metadata__": {"a": 1}}'), 3, "__metadata__"),
    "dtype unknown": (entry(dtype="F31"), 3, "F31"),
    "dtype no text": (entry(dtype=["F32"]), 3, "dtype"),
    "shape negative": (entry(shape=[-4]), 3, "shape"),
    "shape of floats": (entry(shape=[4.0]), 3, "shape"),
    "shape of booleans": (entry(shape=[True, 4]), 3, "shape"),
    "shape overflows": (entry(shape=[2**32, 2**32]), 3, "range"),
    "shape overflows to size": (entry(shape=[2**62, 4, 4]), 3, "range"),
    "shape too large for range": (entry(shape=[5]), 3, "range"),
    "too many dimensions": (entry(shape=[1] * 65 + [4]), 3, "shape"),
    "range reversed": (entry(data_offsets=[16, 0]), 3, "data_offsets"),
    "range of three": (entry(data_offsets=[0, 8, 16]), 3, "data_offsets"),
    "range has a hole": (entry(data_offsets=[4, 20]), 3, "hole"),
    "range overlaps": (
        header(json.dumps({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}), b"\0" * 4),
        3, "overlaps"),
    "truncated": (truncate, 3, "truncated"),
    "bytes after the last tensor": (append, 3, "after the last tensor"),
    # tensors against the config
    "tensor missing": (tensors(lambda t: t.pop(DOWN)), 3, DOWN),
    "tensor extra": (tensors(lambda t: t.update({"model.layers.2.mlp.down_proj.weight": t[DOWN]})), 3, "layers.2"),
    "tensor transposed": (tensors(lambda t: t.update({DOWN: t[DOWN].T.copy()})), 3, "has shape (24, 16)"),
    "tensor name with controls": (tensors(lambda t: t.update({SHAPED: t[DOWN]})), 3, "\\x1b[31mred"),
    "tied head differs": (different_head, 3, "tie_word_embeddings"),
    "untied head missing": (config(tie_word_embeddings=False), 3, "lm_head.weight"),
    # config.json
    "config list": (config_text("[]"), 3, "not an object"),
    "config broken": (config_text("{"), 3, "config.json"),
    "config duplicate key": (config_text('{"model_type": "llama", "model_type": "llama"}'), 3, "duplicate key"),
    "config infinite number": (config_text('{"rms_norm_eps": 1e999}'), 3, "overflows"),
    "config bomb": (config_text("[" * 100_000), 3, "config.json"),
    "config 6000 digits": (config_text('{"vocab_size": ' + "9" * 6000 + "}"), 3, "config.json"),
    "config UTF-16": (config_text('{"a": 1}'.encode("utf-16")), 3, "UTF-8"),
    "config other family": (config(model_type="bert"), 3, "supported: llama, mistral, qwen2, qwen3"),
    "config no family": (without("model_type"), 3, "model_type"),
    "config family no text": (config(model_type=["llama"]), 3, "model_type"),
    "config other head": (config(architectures=["LlamaForSequenceClassification"]), 3, "architectures"),
    "config no size": (without("hidden_size"), 3, "hidden_size"),
    "config huge size": (config(hidden_size=2**31), 3, "hidden_size"),
    "config negative size": (config(vocab_size=-1), 3, "vocab_size"),
    "config zero size": (config(num_attention_heads=0), 3, "num_attention_heads"),
    "config fractional size": (config(hidden_size=128.5), 3, "hidden_size"),
    "config float size": (config(intermediate_size=24.0), 3, "intermediate_size"),
    "config boolean size": (config(num_hidden_layers=True), 3, "num_hidden_layers"),
    "config text size": (config(vocab_size="40"), 3, "vocab_size"),
    "config 10**9 layers": (config(num_hidden_layers=10**9), 3, "num_hidden_layers"),
    "config indivisible heads": (config(num_attention_heads=3), 3, "hidden_size = 16"),
    "config indivisible kv heads": (config(num_key_value_heads=3), 3, "num_key_value_heads"),
    "config odd head": (config(head_dim=3), 3, "head_dim"),
    "config epsilon": (config(rms_norm_eps=0), 3, "rms_norm_eps"),
    "config epsilon text": (config(rms_norm_eps="1e-5"), 3, "rms_norm_eps"),
    "config activation": (config(hidden_act="gelu"), 3, "hidden_act"),
    "config tie is no boolean": (config(tie_word_embeddings="false"), 3, "tie_word_embeddings"),
    "config bias": (config(attention_bias=True), 3, "bias"),
    "config theta": (config(rope_theta=-1.0), 3, "rope_theta"),
    "config two thetas": (config(rope_parameters={"rope_theta": 5.0}), 3, "rope_theta"),
    "config rope type": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), 3, "rope_type"),
    "config rope without factor": (config(rope_scaling={"type": "linear"}), 3, "factor"),
    "config rope nested": (config(rope_parameters={"full_attention": {"rope_theta": 1.0}}), 3, "rope_parameters"),
    "config partial rotary": (config(partial_rotary_factor=0.5), 3, "partial_rotary_factor"),
    "config window per block": (config(use_sliding_window=True), 3, "use_sliding_window"),
    "config end token": (config(eos_token_id=[2, 40]), 3, "eos_token_id"),
    "config quantized": (config(quantization_config={"quant_method": "gptq"}), 3, "already quantized"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_at_once_and_by_name(name: str, tiny_folder: Any) -> None:
    spoil, code, words = CASES[name]
    spoil(tiny_folder)
    start = time.perf_counter()
    with pytest.raises(QtoolError) as caught:
        open_model(str(tiny_folder.path))
    assert time.perf_counter() - start < 2
    line = str(caught.value)
    assert caught.value.exit_code == code
    assert words in line
    assert len(line) <= MAX_MESSAGE_CHARS
    assert line.isprintable()


@pytest.mark.parametrize(
    ("dtype", "kind"), [("F64", np.float64), ("I8", np.int8), ("U8", np.uint8), ("I32", np.int32), ("BOOL", np.bool_)]
)
def test_other_dtypes_are_refused(dtype: str, kind: type, tiny_folder: Any, pack_safetensors: Any) -> None:
    tiny_folder.write_weights(pack_safetensors({k: v.astype(kind) for k, v in tiny_folder.tensors.items()}, dtype))
    with pytest.raises(QtoolError, match=f"stored as {dtype}") as caught:
        open_model(str(tiny_folder.path))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("spec", ["no/such/folder/at/all", "missing.gguf", "a\0b", "x" * 5000, "../..", ""])
def test_nothing_of_that_name_is_a_usage_error(spec: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QtoolError) as caught:
        open_model(spec)
    assert caught.value.exit_code in (2, 3)


def test_a_plain_file_is_a_usage_error(tiny_folder: Any) -> None:
    with pytest.raises(QtoolError, match="neither a folder") as caught:
        open_model(str(tiny_folder.path / "model.safetensors"))
    assert caught.value.exit_code == 2
