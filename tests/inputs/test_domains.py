"""The corpus of domains: its texts are what they say, and sequences are shared out fairly and honestly."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qtool.cli.corpus import load_domains
from qtool.cli.options import CorpusChoice
from qtool.errors import InputRefused, UsageError
from qtool.quantize.inputs import (
    DOMAINS,
    builtin_text,
    domain_texts,
    overlap_windows,
    refuse_overlap,
    tokenize,
    tokenize_domains,
)
from qtool.quantize.inputs.overlap import _fingerprints

NAMES = ("prose", "reference", "code", "mathematics", "dialogue", "scripts")
WRITTEN_SHA256 = {
    "prose": "aaf3143430dd148061036c145e151f8860240d1b248a6768bbf9222a6dd3f601",
    "dialogue": "4a09593cef62add71370d786dfe7465fa5200c9987402c5129bcfb6d9a028953",
    "scripts": "a9bfab8257aed1d0750aa8a3d8b74a2ff4344efa2e493e67624573b842aa788b",
}
# First and last code point, and how many characters of it there must be.
BLOCKS = {
    "Cyrillic": (0x400, 0x4FF, 700),
    "Greek": (0x370, 0x3FF, 700),
    "Arabic": (0x600, 0x6FF, 700),
    "Hebrew": (0x590, 0x5FF, 700),
    "Devanagari": (0x900, 0x97F, 700),
    "Bengali": (0x980, 0x9FF, 700),
    "Thai": (0xE00, 0xE7F, 700),
    "Han": (0x4E00, 0x9FFF, 400),
    "Hiragana": (0x3040, 0x309F, 200),
    "Hangul": (0xAC00, 0xD7A3, 400),
    "Vietnamese": (0x1EA0, 0x1EF9, 100),
    "Emoji": (0x1F300, 0x1FAFF, 80),
}


def files() -> dict[str, bytes]:
    """A byte-level tokenizer without merges: one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return {"tokenizer.json": built.to_str().encode()}


def words(count: int, of: str = "word") -> str:
    """A text of exactly 10 tokens a word."""
    return "".join(f"{of[:4]:4}{i:05d} " for i in range(count))


def test_the_domains_and_their_order() -> None:
    assert tuple(DOMAINS) == tuple(domain_texts()) == NAMES
    assert list(domain_texts(["code", "prose"])) == ["code", "prose"]
    with pytest.raises(UsageError, match="did you mean mathematics"):
        domain_texts(["prose", "mathematic"])


@pytest.mark.parametrize("name", WRITTEN_SHA256)
def test_written_texts_are_the_same_everywhere(name: str) -> None:
    assert hashlib.sha256(domain_texts()[name].encode()).hexdigest() == WRITTEN_SHA256[name]


def test_no_domain_overlaps_the_scoring_text_or_another_domain() -> None:
    texts = domain_texts()
    scoring, seen = builtin_text("scoring"), np.empty(0, dtype=np.uint64)
    for name, text in texts.items():
        refuse_overlap(overlap_windows(text), scoring)
        prints = _fingerprints(text)
        assert np.isin(prints, seen).mean() < 1e-3, name
        seen = np.concatenate([seen, prints])


@pytest.mark.parametrize("name", ["prose", "mathematics", "dialogue", "scripts"])
def test_no_paragraph_and_no_longer_passage_repeats(name: str) -> None:
    text = domain_texts()[name]
    paragraphs = text.strip().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    if name != "mathematics":
        prints = _fingerprints(text)
        assert len(np.unique(prints)) == len(prints)


def test_the_domains_differ_in_kind() -> None:
    texts = domain_texts()

    def share(name: str, pattern: str) -> float:
        return sum(map(len, re.findall(pattern, texts[name]))) / len(texts[name])

    assert all(share("mathematics", r"\d") > 2 * share(name, r"\d") for name in NAMES if name != "mathematics")
    assert share("scripts", r"[\u0370-\u1cff\u3040-\ud7a3]") > 0.4
    assert all(share(name, r"[\u0370-\u1cff\u3040-\ud7a3]") < 0.001 for name in NAMES[:5])
    assert all(share("code", r"[_()\[\]]") > share(name, r"[_()\[\]]") for name in ("prose", "reference", "dialogue"))
    assert share("dialogue", r"(?m)^[A-Z][\w. -]+:") > 0.04 > 0.002 > share("prose", r"(?m)^[A-Z][\w. -]+:")


@pytest.mark.parametrize("block", BLOCKS)
def test_every_script_is_there_and_comes_early(block: str) -> None:
    low, high, least = BLOCKS[block]
    at = [i for i, letter in enumerate(domain_texts(["scripts"])["scripts"]) if low <= ord(letter) <= high]
    assert len(at) >= least
    assert at[0] < 1000  # the first two sequences of 512 tokens reach it


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [(16, [3, 3, 3, 3, 2, 2]), (6, [1] * 6), (4, [1, 1, 1, 1]), (13, [3, 2, 2, 2, 2, 2])],
)
def test_an_even_share_and_the_earlier_domains_first(sequences: int, expected: list[int]) -> None:
    texts = domain_texts()
    tokens = tokenize_domains(files(), texts, sequences=sequences, length=64, vocab_size=256)
    assert tokens.domains == NAMES[: len(expected)]
    assert tokens.domain_of.dtype == np.int64 and tokens.ids.dtype == np.int64
    assert tokens.domain_of.tolist() == np.repeat(range(len(expected)), expected).tolist()
    for index, (name, share) in enumerate(zip(tokens.domains, expected, strict=True)):
        own = tokenize(files(), texts[name], sequences=share, length=64).ids
        assert np.array_equal(tokens.ids[tokens.domain_of == index], own)
    assert [note.split()[1] for note in tokens.notes] == list(NAMES[len(expected) :])


def test_a_short_builtin_domain_gives_what_it_has_and_the_others_share_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = {
        "prose": words(20),
        "code": words(1000, "code"),
        "dialogue": words(9, "talk"),
        "scripts": words(500, "glyp"),
    }
    monkeypatch.setattr("qtool.quantize.inputs.domains.DOMAINS", {name: lambda t=t: t for name, t in short.items()})
    tokens = tokenize_domains(files(), short, sequences=12, length=100, vocab_size=256)
    assert dict(zip(tokens.domains, np.bincount(tokens.domain_of).tolist(), strict=True)) == {
        "prose": 2,
        "code": 5,
        "scripts": 5,
    }
    assert tokens.notes == (
        "domain prose gives 2 of 3 sequences of 100 tokens: its text has no more",
        "domain dialogue is left out: it has 90 tokens, less than one sequence of 100",
    )
    everything = tokenize_domains(files(), short, sequences=500, length=100, vocab_size=256)
    assert len(everything.ids) == 2 + 100 + 50
    assert everything.notes[-1].startswith("152 sequences instead of 500")
    with pytest.raises(InputRefused, match=r"none has 20000 tokens, the longest \(code\) has 10000; .*--length"):
        tokenize_domains(files(), short, sequences=4, length=20_000)


def test_a_short_text_of_the_users_own_is_refused_even_under_a_builtin_name() -> None:
    texts = {"law": words(1000), "prose": words(29)}
    with pytest.raises(
        InputRefused, match="domain prose: has 290 tokens, 3 sequences of 100 are needed; ask for fewer"
    ):
        tokenize_domains(files(), texts, sequences=6, length=100)
    assert tokenize_domains(files(), texts, sequences=4, length=100).domain_of.tolist() == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="name one"):
        tokenize_domains(files(), {}, sequences=4, length=100)
    with pytest.raises(UsageError, match="0 sequences"):
        tokenize_domains(files(), texts, sequences=0, length=100)


def test_the_digest_is_over_names_and_texts() -> None:
    def digest(**texts: str) -> str:
        return tokenize_domains(files(), texts, sequences=len(texts), length=8).text_sha256

    one, other = words(5), words(5, "else")
    digests = [digest(a=one, b=other), digest(b=other, a=one), digest(a=other, b=one), digest(a=one, c=other)]
    assert len(set(digests)) == 4 and digest(a=one, b=other) == digests[0]


def test_progress_names_each_domain() -> None:
    told: list[tuple[int, int, str]] = []
    texts = {"a": words(9), "b": words(9)}
    tokenize_domains(files(), texts, sequences=2, length=8, step=lambda *step: told.append(step))
    assert told == [(0, 2, "a"), (1, 2, "b"), (2, 2, "b")]


def choice(text: Path | None = None, dataset: str | None = None) -> CorpusChoice:
    return CorpusChoice(text=text, dataset=dataset, sequences=4, length=16)


def test_the_command_lines_domains(tmp_path: Path) -> None:
    law, news = tmp_path / "law=1.txt", tmp_path / "news.txt"
    law.write_text(words(40))
    news.write_text(words(40, "news"))
    own = load_domains(files(), choice(), [f"law={law}", f"news={news}"], vocab_size=256)
    assert own.domains == ("law", "news") and own.domain_of.tolist() == [0, 0, 1, 1]
    assert load_domains(files(), choice(text=law), vocab_size=256).domains == ("text",)
    assert load_domains(files(), choice(), vocab_size=256).domains == NAMES[:4]


@pytest.mark.parametrize(
    ("domains", "message"),
    [(["law"], "NAME=FILE"), (["=f"], "NAME=FILE"), (["law="], "NAME=FILE"), (["a={f}", "a={f}"], "twice")],
)
def test_a_wrong_domain_option_is_refused(domains: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    file.write_text(words(40))
    with pytest.raises(UsageError, match=message):
        load_domains(files(), choice(), [domain.format(f=file) for domain in domains], vocab_size=256)
    with pytest.raises(UsageError, match="alternatives"):
        load_domains(files(), choice(text=file), domains, vocab_size=256)
