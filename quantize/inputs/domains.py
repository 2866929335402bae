"""A corpus of several domains: prose, reference text, code, mathematics, dialogue and other scripts.

Prose, dialogue and scripts are text written for qtool, in texts/; reference and code are the library's part of the
built-in corpus' calibration half; mathematics is generated. Nothing of it stands in the scoring half, so that it may be
calibrated on. The encyclopedia is calibrated on alone: what is measured stays what it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused, UsageError, nearest
from qtool.quantize.inputs.corpus import sections
from qtool.quantize.inputs.domains_mathematics import mathematics_text
from qtool.quantize.inputs.texts import written_text
from qtool.quantize.inputs.tokens import TokenCutter

MATHEMATICS_CHARS = 200_000


@cache
def _from_library(kind: str) -> str:
    return "\n\n".join(sections("calibration")[kind])


@cache
def _mathematics() -> str:
    return mathematics_text(MATHEMATICS_CHARS)


DOMAINS: Mapping[str, Callable[[], str]] = MappingProxyType(
    {
        "prose": partial(written_text, "prose"),
        "reference": partial(_from_library, "reference"),
        "code": partial(_from_library, "code"),
        "mathematics": _mathematics,
        "dialogue": partial(written_text, "dialogue"),
        "scripts": partial(written_text, "scripts"),
    }
)


@dataclass(frozen=True, kw_only=True)
class DomainTokens:
    """Token ids of several domains and where they came from.

    Attributes:
        ids: int64 [B, T]; the sequences of one domain are consecutive.
        domains: the domains that have a sequence, in the order given.
        domain_of: int64 [B], index into `domains`.
        text_sha256: over names and texts of all domains given.
        tokenizer_sha256: of tokenizer.json.
        notes: what a user should know: domains that came short or were left out.
    """

    ids: npt.NDArray[np.int64]
    domains: tuple[str, ...]
    domain_of: npt.NDArray[np.int64]
    text_sha256: str
    tokenizer_sha256: str
    notes: tuple[str, ...] = ()


def domain_texts(names: Sequence[str] | None = None) -> dict[str, str]:
    """The built-in texts by name, all of them unless some are named.

    Raises:
        UsageError: no such domain.
    """
    chosen = tuple(DOMAINS) if names is None else names
    for name in chosen:
        if name not in DOMAINS:
            raise UsageError(f"domain {name}", "is not built in", nearest(name, DOMAINS))
    return {name: DOMAINS[name]() for name in chosen}


def tokenize_domains(
    tokenizer_files: Mapping[str, bytes],
    texts: Mapping[str, str],
    *,
    sequences: int,
    length: int,
    vocab_size: int | None = None,
    step: Callable[[int, int, str], None] | None = None,
) -> DomainTokens:
    """Cut sequences from several texts, as evenly shared out as can be, the earlier domains first.

    A built-in text that is too short gives the whole sequences it has, and the others share the rest.

    Args:
        tokenizer_files: must hold tokenizer.json.
        texts: domain to text; one unnamed text is {"text": text}.
        sequences: B, of all domains together.
        length: T.
        vocab_size: rows of the embedding; ids must be below.
        step: told (domains done, domains, the domain at hand).

    Raises:
        UsageError: no texts, or sequences or length that make no sense.
        InputRefused: a text of the user's that is too short, no built-in text that is long enough, or what `tokenize`
            refuses.
    """
    if not texts:
        raise UsageError("domains", "none is given", "name one or more")
    if sequences < 1:
        raise UsageError(f"{sequences} sequences", "make no text", "give 1 or more")
    cutter = TokenCutter(tokenizer_files, length)
    whole, counted = {}, {}
    for done, (name, text) in enumerate(texts.items()):
        if step is not None:
            step(done, len(texts), name)
        whole[name], counted[name] = cutter.count(text, sequences)
    shares = _shares(sequences, {name: whole[name] if _is_builtin(name, texts[name]) else sequences for name in texts})
    for name, share in shares.items():
        if share > whole[name]:
            why = f"has {counted[name]} tokens, {share} sequences of {length} are needed"
            raise InputRefused(f"domain {name}", why, "ask for fewer or shorter sequences, or give a longer text")
    used = tuple(name for name, share in shares.items() if share)
    if not used:
        longest = max(counted, key=lambda name: counted[name])
        why = f"none has {length} tokens, the longest ({longest}) has {counted[longest]}"
        raise InputRefused("built-in domains", why, "give a shorter --length, or a long text with --text")
    parts = [cutter.cut(texts[name], shares[name], vocab_size) for name in used]
    if step is not None:
        step(len(texts), len(texts), used[-1])
    return DomainTokens(
        ids=np.concatenate([part.ids for part in parts]),
        domains=used,
        domain_of=np.repeat(np.arange(len(used), dtype=np.int64), [shares[name] for name in used]),
        text_sha256=_digest(texts.items()),
        tokenizer_sha256=cutter.sha256,
        notes=tuple(_notes(shares, whole, counted, sequences, length)),
    )


def _is_builtin(name: str, text: str) -> bool:
    return name in DOMAINS and DOMAINS[name]() == text


def _shares(sequences: int, most: Mapping[str, int]) -> dict[str, int]:
    """One sequence a domain and round, in order, until all are given or no domain has more."""
    shares = dict.fromkeys(most, 0)
    left = sequences
    while left and (open_ones := [name for name in most if shares[name] < most[name]]):
        rounds = max(1, min(left // len(open_ones), *(most[name] - shares[name] for name in open_ones)))
        for name in open_ones[:left]:
            shares[name] += rounds
            left -= rounds
    return shares


def _notes(
    shares: Mapping[str, int], whole: Mapping[str, int], counted: Mapping[str, int], sequences: int, length: int
) -> Iterable[str]:
    even = _shares(sequences, dict.fromkeys(shares, sequences))
    for name, share in shares.items():
        if whole[name] == 0:
            yield f"domain {name} is left out: it has {counted[name]} tokens, less than one sequence of {length}"
        elif share == 0:
            yield f"domain {name} is left out: {sequences} sequences are too few for {len(shares)} domains"
        elif share < even[name]:
            yield f"domain {name} gives {share} of {even[name]} sequences of {length} tokens: its text has no more"
    if (total := sum(shares.values())) < sequences:
        yield f"{total} sequences instead of {sequences}: the built-in domains have no more of {length} tokens"


def _digest(texts: Iterable[tuple[str, str]]) -> str:
    pairs = [[name, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()] for name, text in texts]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
