"""Tokens are the text's own, consecutive, with a BOS where the tokenizer begins texts with one."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from qtool.errors import InputRefused, UsageError
from qtool.quantize.inputs import builtin_text, overlap_windows, tokenize

TEXT = builtin_text("scoring")[:60_000]


def tokenizer(bos: bool = False, merges: int = 0) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "etaoinsh" for b in "etaoinsh"][:merges]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<bos>", "<eos>"])
    if bos:
        built.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[(t, built.token_to_id(t)) for t in ("<bos>", "<eos>")]
        )
    return built


def files(bos: bool = False, merges: int = 64, **config: Any) -> dict[str, bytes]:
    found = {"tokenizer.json": tokenizer(bos, merges).to_str().encode()}
    return found | ({"tokenizer_config.json": json.dumps(config).encode()} if config else {})


@pytest.mark.parametrize(("sequences", "length"), [(1, 2), (4, 64), (3, 1000), (16, 1024)])
def test_ids_are_the_whole_texts_first_ids(sequences: int, length: int) -> None:
    whole = tokenizer(merges=64).encode(TEXT).ids
    tokens = tokenize(files(), TEXT, sequences=sequences, length=length)
    assert tokens.ids.dtype == np.int64 and tokens.ids.shape == (sequences, length)
    assert tokens.ids.reshape(-1).tolist() == whole[: sequences * length]


def test_every_sequence_begins_with_the_tokenizers_own_bos() -> None:
    whole = tokenizer(merges=64).encode(TEXT).ids
    tokens = tokenize(files(bos=True), TEXT, sequences=5, length=33)
    bos = tokenizer(merges=64).token_to_id("<bos>")
    assert (tokens.ids[:, 0] == bos).all()
    assert tokens.ids[:, 1:].reshape(-1).tolist() == whole[: 5 * 32]


@pytest.mark.parametrize(
    ("config", "begins"),
    [
        ({"add_bos_token": True, "bos_token": "<bos>"}, True),
        ({"add_bos_token": True, "bos_token": {"content": "<bos>"}}, True),
        ({"add_bos_token": False, "bos_token": "<bos>"}, False),
        ({"add_bos_token": True}, False),
        ({"bos_token": "<bos>"}, False),
    ],
)
def test_the_config_may_ask_for_a_bos(config: dict[str, Any], begins: bool) -> None:
    tokens = tokenize(files(**config), TEXT, sequences=2, length=8)
    assert (tokens.ids[0, 0] == tokenizer(merges=64).token_to_id("<bos>")) == begins


def test_hashes_and_windows() -> None:
    found = files()
    tokens = tokenize(found, TEXT, sequences=2, length=512)
    assert tokens.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert tokens.tokenizer_sha256 == hashlib.sha256(found["tokenizer.json"]).hexdigest()
    covered = tokenizer(merges=64).decode(tokens.ids.reshape(-1).tolist())
    assert TEXT.startswith(covered)
    assert tokens.windows == overlap_windows(covered)


def test_a_short_text_says_how_many_tokens_it_has() -> None:
    count = len(tokenizer(merges=64).encode(TEXT[:500]).ids)
    with pytest.raises(InputRefused, match=f"has {count} tokens, {2 * count} are needed"):
        tokenize(files(), TEXT[:500], sequences=2, length=count)
    assert tokenize(files(), TEXT[:500], sequences=1, length=count).ids.shape == (1, count)


def test_only_as_much_text_as_needed_is_encoded() -> None:
    start = time.perf_counter()
    tokenize(files(), TEXT * 500, sequences=1, length=64)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("text", ["x" * 2_000_000, "a b\n" * 500_000, "é" * 1_000_000], ids=["word", "line", "accents"])
def test_endless_words_and_lines_take_bounded_time(text: str) -> None:
    start = time.perf_counter()
    tokens = tokenize(files(), text, sequences=4, length=256)
    assert time.perf_counter() - start < 5
    assert tokens.ids.shape == (4, 256)


def test_the_end_of_the_encoded_part_never_shows() -> None:
    """Long tokens in a word without end: where the part is cut, its last token is another one than in the text."""
    built = tokenizer()
    model = json.loads(built.to_str())
    pairs = ["ab", "abab", "abababab"]
    model["model"]["vocab"] |= {token: 300 + i for i, token in enumerate(pairs)}
    model["model"]["merges"] = [[pair[: len(pair) // 2]] * 2 if len(pair) > 2 else ["a", "b"] for pair in pairs]
    data = {"tokenizer.json": json.dumps(model).encode()}
    for count in range(150, 260):
        assert (tokenize(data, "ab" * 5000, sequences=1, length=count).ids == 302).all()


def test_ids_beyond_the_embedding_are_refused() -> None:
    highest = int(tokenize(files(), TEXT, sequences=4, length=64).ids.max())
    tokenize(files(), TEXT, sequences=4, length=64, vocab_size=highest + 1)
    with pytest.raises(InputRefused, match=f"the id {highest}, the model has {highest} tokens"):
        tokenize(files(), TEXT, sequences=4, length=64, vocab_size=highest)


BROKEN = json.loads(tokenizer().to_str())
PANIC = BROKEN | {"model": BROKEN["model"] | {"merges": [["q", "z"]]}}


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"\xff\xfe", b"not json", json.dumps(PANIC).encode(), b"[" * 100_000],
    ids=["empty", "object", "list", "binary", "words", "merge of no tokens", "bomb"],
)
def test_a_broken_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(InputRefused, match=r"tokenizer\.json"):
        tokenize({"tokenizer.json": data}, TEXT, sequences=1, length=8)


def test_a_panic_of_the_library_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panics:
        def no_truncation(self) -> None: ...
        def no_padding(self) -> None: ...
        def encode(self, *_: Any, **__: Any) -> Any:
            raise PanicException("index out of bounds")

    monkeypatch.setattr("tokenizers.Tokenizer.from_buffer", lambda data: Panics(), raising=True)
    with pytest.raises(InputRefused, match="index out of bounds"):
        tokenize(files(), TEXT, sequences=1, length=8)


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(data: bytes) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenizers.Tokenizer.from_buffer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenize(files(), TEXT, sequences=1, length=8)


def test_no_tokenizer_and_senseless_sizes() -> None:
    with pytest.raises(InputRefused, match="has none"):
        tokenize({}, TEXT, sequences=1, length=8)
    for sequences, length in ((0, 8), (1, 1), (-1, 8)):
        with pytest.raises(UsageError):
            tokenize(files(), TEXT, sequences=sequences, length=length)
