"""Generation: greedy, sampling, ends, refusals; and text in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.errors import InputRefused, UsageError
from qtool.runtime.generate import generate, pick
from qtool.runtime.ort import OrtSession
from qtool.runtime.ort import session as ort_module
from qtool.runtime.tokenizer import Tokenizer

PROMPT = np.array([5, 6, 7, 8, 9], dtype=np.int64)


@pytest.fixture
def session(float_package: Path) -> OrtSession:
    return OrtSession(float_package, threads=1, max_length=64)


def test_greedy_takes_the_likeliest_id_each_time(session: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(generate(session, PROMPT, max_new_tokens=12))
    ids = list(PROMPT)
    for token in found:
        session.reset()
        assert int(session.prefill(np.array([ids]))[0, -1].argmax()) == token
        ids.append(token)
    monkeypatch.setattr(ort_module, "CHUNK", 2)
    assert list(generate(session, PROMPT, max_new_tokens=12)) == found
    assert list(generate(session, PROMPT, max_new_tokens=12, eos_ids=[found[4]])) == found[: found.index(found[4])]
    assert list(generate(session, PROMPT, max_new_tokens=0)) == []


def test_sampling_repeats_with_its_seed(session: OrtSession) -> None:
    def run(seed: int) -> list[int]:
        return list(generate(session, PROMPT, max_new_tokens=20, temperature=1.5, seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3], dtype=np.float32))

    def shares(**options: Any) -> np.ndarray:
        generator = np.random.default_rng(0)
        drawn = [
            pick(logits, generator=generator, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options})
            for _ in range(4000)
        ]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.05, 0.5, 0.15, 0.3], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.6), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.01), [0, 1, 0, 0])
    squared = np.array([0.05, 0.5, 0.15, 0.3]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"max_new_tokens": 60},
    ],
)
def test_bad_options_are_refused_before_anything_runs(session: OrtSession, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        generate(session, PROMPT, **{"max_new_tokens": 4, **options})


def test_an_empty_prompt_and_broken_logits_are_refused(session: OrtSession) -> None:
    with pytest.raises(UsageError, match="no token"):
        generate(session, PROMPT[:0], max_new_tokens=4)
    with pytest.raises(InputRefused, match="finite"):
        pick(
            np.array([0, np.nan], dtype=np.float32),
            temperature=0,
            top_k=0,
            top_p=1,
            generator=np.random.default_rng(0),
        )


def test_text_survives_the_tokenizer(tiny_model: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(tiny_model())
    text = "naïve 漢字 🎉\n"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == text
    assert "🎉" in pieces, "a character of several tokens came in parts"
    assert tokenizer.eos_ids == {258}


def test_bos_is_added_once_when_the_config_asks(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model()
    assert 257 not in Tokenizer(folder).encode("a")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    tokenizer = Tokenizer(folder)
    assert list(tokenizer.encode("a")).count(257) == 1
    assert list(tokenizer.encode("<bos>a")).count(257) == 1


def test_the_packages_own_end_ids_come_first(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model()
    (folder / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [3, 4]}}))
    assert Tokenizer(folder).eos_ids == {3, 4}


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputRefused, match="not a tokenizer"):
        Tokenizer(tmp_path)
