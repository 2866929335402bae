"""Text to token ids and back, from the tokenizer files that lie in a package or beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import DecodeStream

from qtool.errors import InputRefused, UsageError
from qtool.runtime.session import IntArray


class Tokenizer:
    """A tokenizer.json with its policies.

    Beginning of sequence: what the file's own post-processor adds, and where it adds nothing but
    tokenizer_config.json says `add_bos_token: true`, one bos token; never two.

    Args:
        folder: holds tokenizer.json; and, each used when present, tokenizer_config.json, genai_config.json,
            generation_config.json, config.json.

    Attributes:
        eos_ids: ids that end a text.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UsageError(path, "does not exist", "give a folder with a tokenizer")
        try:
            self._tokenizer = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputRefused(path, f"is not a tokenizer ({error})", "export the package again") from error
        self._bos = self._bos_id(_read_json(folder / "tokenizer_config.json"))
        self.eos_ids = _eos_ids(folder)

    def encode(self, text: str) -> IntArray:
        """Token ids [T] of a text, special tokens included."""
        ids = self._tokenizer.encode(text).ids
        if self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as the ids come; a character of several tokens comes out whole, once."""
        decoder = DecodeStream(skip_special_tokens=True)
        for i in ids:
            if piece := decoder.step(self._tokenizer, int(i)):
                yield piece

    def _bos_id(self, config: dict[str, Any]) -> int | None:
        if config.get("add_bos_token") is not True:
            return None
        token = config.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        bos: int | None = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return bos


def _eos_ids(folder: Path) -> frozenset[int]:
    found = (
        _read_json(folder / "genai_config.json").get("model", {}).get("eos_token_id"),
        _read_json(folder / "generation_config.json").get("eos_token_id"),
        _read_json(folder / "config.json").get("eos_token_id"),
    )
    first: Any = next((value for value in found if value is not None), [])
    return frozenset(int(i) for i in (first if isinstance(first, list) else [first]))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InputRefused(path, "is not JSON", "export the package again") from None
    return data if isinstance(data, dict) else {}
