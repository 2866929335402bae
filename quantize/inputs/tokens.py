"""Text to token ids, as calibration and scoring want them: [sequences, length], consecutive, nothing skipped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused, UsageError
from qtool.quantize.inputs.overlap import overlap_windows
from qtool.quantize.inputs.rust_panic import refuse_failures
from qtool.quantize.inputs.strict_json import parse_json_object

TOKENIZER = "tokenizer.json"
SPARE_TOKENS = 64
FIRST_CHARS_PER_TOKEN = 6
MAX_WORD_CHARS = 4096


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids and where they came from.

    Attributes:
        ids: int64 [B, T].
        text_sha256: of the whole text, as UTF-8.
        tokenizer_sha256: of tokenizer.json.
        windows: overlap fingerprint of the part of the text that the ids cover.
    """

    ids: npt.NDArray[np.int64]
    text_sha256: str
    tokenizer_sha256: str
    windows: tuple[str, ...]


def tokenize(
    tokenizer_files: Mapping[str, bytes], text: str, *, sequences: int, length: int, vocab_size: int | None = None
) -> Tokens:
    """Cut a text's tokens into consecutive sequences.

    The text is encoded without special tokens. Where the tokenizer begins every text with a BOS (its own
    post-processor does, or add_bos_token in tokenizer_config.json says so), every sequence begins with it and holds
    length − 1 tokens of text.

    Args:
        tokenizer_files: must hold tokenizer.json.
        text: only as much of it is encoded as the ids need.
        sequences: B.
        length: T.
        vocab_size: rows of the embedding; ids must be below.

    Raises:
        UsageError: sequences or length that make no sense.
        InputRefused: no tokenizer, a broken one, a text with too few tokens, ids beyond the embedding.
    """
    return TokenCutter(tokenizer_files, length).cut(text, sequences, vocab_size)


class TokenCutter:
    """A tokenizer that is read once and cuts sequences of one length from any number of texts; see `tokenize`."""

    def __init__(self, tokenizer_files: Mapping[str, bytes], length: int) -> None:
        if length < 2:
            raise UsageError(f"length {length}", "makes no text", "give 2 or more")
        if TOKENIZER not in tokenizer_files:
            raise InputRefused(TOKENIZER, "the model has none", "put its tokenizer.json into the model's folder")
        data = tokenizer_files[TOKENIZER]
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._tokenizer = _load(data)
        self._prefix = _prefix(self._tokenizer, tokenizer_files.get("tokenizer_config.json", b"{}"))
        self._own = length - len(self._prefix)  # tokens of text in a sequence
        if self._own < 1:
            why = f"the tokenizer begins each text with {len(self._prefix)} tokens"
            raise UsageError(f"length {length}", why, "give more")

    def count(self, text: str, sequences: int) -> tuple[int, int]:
        """How many sequences a text gives, at most `sequences`, and the tokens of text looked at for it.

        The second number is the whole text's count where the first is below `sequences`.
        """
        ids, _ = _encode(self._tokenizer, text, sequences * self._own)
        return len(ids) // self._own, len(ids)

    def cut(self, text: str, sequences: int, vocab_size: int | None = None) -> Tokens:
        """The first sequences of a text; see `tokenize`."""
        if sequences < 1:
            raise UsageError(f"{sequences} sequences", "make no text", "give 1 or more")
        count = sequences * self._own
        ids, used = _encode(self._tokenizer, text, count)
        if len(ids) < count:
            why = f"has {len(ids)} tokens, {count} are needed"
            raise InputRefused("text", why, "give a longer text, or ask for fewer or shorter sequences")
        rows = np.array(ids, dtype=np.int64).reshape(sequences, self._own)
        whole = np.hstack([np.tile(np.array(self._prefix, dtype=np.int64), (sequences, 1)), rows])
        if vocab_size is not None and int(whole.max()) >= vocab_size:
            why = f"gives the id {int(whole.max())}, the model has {vocab_size} tokens"
            raise InputRefused(TOKENIZER, why, "use the tokenizer that belongs to the model")
        return Tokens(
            ids=whole,
            text_sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            tokenizer_sha256=self.sha256,
            windows=overlap_windows(text[:used]),
        )


def token_texts(tokenizer_files: Mapping[str, bytes], ids: Iterable[int]) -> dict[int, str]:
    """What single token ids stand for, for people to read."""
    tokenizer = _load(tokenizer_files[TOKENIZER])
    with refuse_failures(TOKENIZER, "give the model's own tokenizer.json"):
        return {i: tokenizer.decode([i], skip_special_tokens=False) for i in sorted(set(ids))}


def _load(data: bytes) -> Any:
    with refuse_failures(TOKENIZER, "give the model's own tokenizer.json"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _prefix(tokenizer: Any, config: bytes) -> list[int]:
    """The ids that begin every text."""
    with refuse_failures(TOKENIZER, "give the model's own tokenizer.json"):
        bare: list[int] = tokenizer.encode("x", add_special_tokens=False).ids
        full: list[int] = tokenizer.encode("x").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                if start:
                    return full[:start]
                break
        settings = parse_json_object("tokenizer_config.json", config)
        token = settings.get("bos_token")
        name = token.get("content") if isinstance(token, dict) else token
        bos = tokenizer.token_to_id(name) if isinstance(name, str) else None
        return [bos] if settings.get("add_bos_token") is True and bos is not None else []


def _encode(tokenizer: Any, text: str, count: int) -> tuple[list[int], int]:
    """The first `count` ids of a text, fewer where it has fewer, and how many characters they cover.

    A prefix of the text is encoded, long enough that its end cannot change the ids that are taken.
    """
    taken = FIRST_CHARS_PER_TOKEN * (count + SPARE_TOKENS)
    while True:
        part = text[: _cut(text, taken)]
        with refuse_failures("text", "give a plain text, and the model's own tokenizer.json"):
            encoding = tokenizer.encode(part, add_special_tokens=False)
        ids: list[int] = encoding.ids
        whole = len(part) == len(text)
        if whole or len(ids) >= count + SPARE_TOKENS:
            return ids[:count], max((end for _, end in encoding.offsets[:count]), default=0)
        taken *= 2


def _cut(text: str, position: int) -> int:
    """The last white space before `position`, where a cut does not split a word; words of absurd length are split."""
    if position >= len(text):
        return len(text)
    for index in range(position, max(position - MAX_WORD_CHARS, 0), -1):
        if text[index].isspace():
            return index
    return position
