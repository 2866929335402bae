"""Which tokens a command reads: the user's text, a hub data set, or the built-in corpus."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantize.inputs import Tokens


def load_text(split: Literal["calibration", "scoring"], text: Path | None, dataset: str | None) -> str:
    """The text a command was asked for; the built-in corpus when neither a file nor a data set is named."""
    from qtool.quantize.inputs import builtin_text, dataset_text, read_text

    if text is not None and dataset is not None:
        raise UsageError("--text and --dataset", "are alternatives", "give one")
    if text is not None:
        return read_text(text)
    return dataset_text(dataset, split) if dataset is not None else builtin_text(split)


def load_tokens(
    split: Literal["calibration", "scoring"],
    tokenizer_files: Mapping[str, bytes],
    *,
    text: Path | None,
    dataset: str | None,
    sequences: int,
    length: int,
    vocab_size: int,
    calibration_windows: tuple[str, ...] = (),
) -> Tokens:
    """Tokens [sequences, length] of that text; a scoring text that overlaps the calibration text is refused."""
    from qtool.quantize.inputs import refuse_overlap, tokenize

    content = load_text(split, text, dataset)
    tokens = tokenize(tokenizer_files, content, sequences=sequences, length=length, vocab_size=vocab_size)
    if calibration_windows:
        refuse_overlap(calibration_windows, content)
    return tokens
