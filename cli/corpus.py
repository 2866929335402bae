"""Which tokens a command reads: the user's text, a hub data set, or the built-in corpus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qtool.cli.options import CorpusChoice
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantize.inputs import DomainTokens, Tokens


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


def load_domains(
    tokenizer_files: Mapping[str, bytes],
    choice: CorpusChoice,
    domains: Sequence[str] = (),
    *,
    vocab_size: int,
    step: Callable[[int, int, str], None] | None = None,
) -> DomainTokens:
    """Tokens of the domains asked for: NAME=FILE each, one from --text or --dataset, or else the built-in ones."""
    from qtool.quantize.inputs import domain_texts, tokenize_domains

    if domains and (choice.text is not None or choice.dataset is not None):
        raise UsageError("--domain and --text or --dataset", "are alternatives", "give one")
    if domains:
        texts = _named_texts(domains)
    elif choice.text is not None or choice.dataset is not None:
        texts = {"text": load_text("calibration", choice)}
    else:
        texts = domain_texts()
    return tokenize_domains(
        tokenizer_files, texts, sequences=choice.sequences, length=choice.length, vocab_size=vocab_size, step=step
    )


def _named_texts(domains: Sequence[str]) -> dict[str, str]:
    from qtool.quantize.inputs import read_text

    texts: dict[str, str] = {}
    for domain in domains:
        name, equals, file = domain.partition("=")
        name = name.strip()
        if not (name and equals and file):
            raise UsageError(f"--domain {domain}", "is not NAME=FILE", "give both, as in law=contracts.txt")
        if name in texts:
            raise UsageError(f"--domain {domain}", f"{name} is named twice", "give every domain a name of its own")
        texts[name] = read_text(Path(file))
    return texts
