"""Tokenizers made from GGUF metadata cut text as the families' own tokenizers do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from qtool.errors import InputRefused
from qtool.quantize.inputs.gguf_tokenizer import PRE_TOKENIZERS, gguf_tokenizer_files

CONFIG = {"vocab_size": 300, "bos_token_id": 258, "eos_token_id": 259, "pad_token_id": None}


def metadata(**changes: Any) -> dict[str, Any]:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "Ġ1", "<bos>", "<eos>", "<tool>"]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": np.array([1] * 258 + [3, 3, 4], dtype=np.int32),
        "merges": ["1 2", "Ġ 1"],
        "bos_token_id": 258,
        "eos_token_id": 259,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


def build(**changes: Any) -> Tokenizer:
    return Tokenizer.from_buffer(gguf_tokenizer_files("f", metadata(**changes), CONFIG)["tokenizer.json"])


def pieces(pre: str, text: str) -> list[str]:
    tokenizer = build(pre=pre)
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Don", "'t", " add", " 1234", ",", "  ", " ok", "\n"]),
        ("smollm", ["Don", "'t", " add", " ", "1", "2", "3", "4", ",", "  ", " ok", "\n"]),
        ("llama-bpe", ["Don", "'t", " add", " ", "123", "4", ",", "  ", " ok", "\n"]),
        ("qwen2", ["Don", "'t", " add", " ", "1", "2", "3", "4", ",", "  ", " ok", "\n"]),
    ],
)
def test_pieces(pre: str, expected: list[str]) -> None:
    assert pieces(pre, "Don't add 1234,   ok\n") == expected


def test_digits_are_single_before_merges_can_join_them() -> None:
    assert build(pre="smollm").encode("12 1").tokens == ["1", "2", "Ġ", "1"]
    assert build(pre="gpt-2").encode("12 1").tokens == ["12", "Ġ1"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_decoding_gives_the_text_back(pre: str) -> None:
    text = "Grüße 12 345,  日本語 👩‍👧\n\n\ttab I'll  "
    tokenizer = build(pre=pre, add_bos_token=False)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_are_special_and_user_tokens_are_not() -> None:
    tokenizer = build()
    ids = tokenizer.encode("a<eos><tool>").ids
    assert ids[1:] == [259, 260]
    assert tokenizer.decode(ids) == "a<tool>"


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos(pre: str, flag: bool | None, begins: bool) -> None:
    files = gguf_tokenizer_files("f", metadata(pre=pre, add_bos_token=flag), CONFIG)
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    assert (tokenizer.encode("a").ids[0] == 258) == begins
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] == begins


def test_qwen_composes_characters() -> None:
    assert build(pre="qwen2").encode("e\u0301").ids == build(pre="qwen2").encode("é").ids


def test_chat_template_and_ids_are_carried_over() -> None:
    values = metadata(eot_token_id=260) | {"tokenizer.chat_template": "{{ messages }}"}
    files = gguf_tokenizer_files("f", values, CONFIG)
    assert files["chat_template.jinja"] == b"{{ messages }}"
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<bos>", "<eos>")
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 258, "eos_token_id": [259, 260]}


def test_transformers_reads_the_files(tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    files = gguf_tokenizer_files("f", metadata() | {"tokenizer.chat_template": "{{ bos_token }}hi"}, CONFIG)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == 259
    assert tokenizer("12 1")["input_ids"] == build().encode("12 1").ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "<bos>hi"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "tekken"}, "unknown pre-tokenizer"),
        ({"pre": None}, "unknown pre-tokenizer"),
        ({"model": "llama"}, "no byte-level BPE"),
        ({"tokens": None}, "tokens"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"tokens": [str(i) for i in range(301)]}, "301 tokens"),
        ({"merges": np.zeros(3)}, "merges"),
        ({"merges": ["zz yy"]}, "refuses it"),
        ({"bos_token_id": 5000}, "bos_token_id = 5000"),
        ({"eos_token_id": True}, "eos_token_id = True"),
    ],
)
def test_damaged_metadata_is_refused_with_the_way_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputRefused, match=words) as caught:
        gguf_tokenizer_files("f", metadata(**changes), CONFIG)
    assert "tokenizer.json beside" in str(caught.value)
