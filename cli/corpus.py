"""Which tokens a command reads: the user's text, a hub data set, or the built-in corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from qtool.cli.options import CorpusChoice
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantize.inputs import Tokens


def load_text(split: Literal["calibration", "scoring"], choice: CorpusChoice) -> str:
    """The text a command was asked for; the built-in corpus when neither a file nor a data set is named."""
    from qtool.quantize.inputs import builtin_text, dataset_text, read_text

    if choice.text is not None and choice.dataset is not None:
        raise UsageError("--text and --dataset", "are alternatives", "give one")
    if choice.text is not None:
        return read_text(choice.text)
    return dataset_text(choice.dataset, split) if choice.dataset is not None else builtin_text(split)


def load_tokens(
    split: Literal["calibration", "scoring"],
    tokenizer_files: Mapping[str, bytes],
    choice: CorpusChoice,
    *,
    vocab_size: int,
    calibration_windows: tuple[str, ...] = (),
) -> Tokens:
    """Tokens [sequences, length] of that text; a scoring text that overlaps the calibration text is refused."""
    from qtool.quantize.inputs import refuse_overlap, tokenize

    text = load_text(split, choice)
    tokens = tokenize(
        tokenizer_files, text, sequences=choice.sequences, length=choice.length, vocab_size=vocab_size
    )
    if calibration_windows:
        refuse_overlap(calibration_windows, text)
    return tokens
