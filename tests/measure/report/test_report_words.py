import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from qtool.quantize.measure.report.as_json import findings_json, json_text
from qtool.quantize.measure.report.kinds import BLOCK_OUTPUT, block_of, kind_of
from qtool.quantize.measure.report.words import decibel, drawable, listed, markdown, number, share, token, visible


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (12345.678, "12,300"),
        (-0.01234, "−0.0123"),
        (9.996, "10.00"),
        (1.5e7, "1.50×10⁷"),
        (2e-5, "2.00×10⁻⁵"),
        (math.inf, "–"),
        (math.nan, "–"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_share_never_rounds_to_all_or_nothing() -> None:
    assert [share(v) for v in (0.0, 0.0004, 0.012, 0.5, 0.9999, 1.0)] == [
        "0 %",
        "< 0.1 %",
        "1.2 %",
        "50 %",
        "99.9 %",
        "100 %",
    ]


def test_decibels_say_exact_and_unknown() -> None:
    assert [decibel(v) for v in (-3.04, 300.0, math.nan)] == ["−3.0", "exact", "–"]


def test_lists_read_as_prose() -> None:
    assert [listed(list(letters)) for letters in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_hidden_characters_become_escapes() -> None:
    assert visible("a\n\t\u202e\u200bb") == "a\\n\\t\\u202e\\u200bb"
    assert visible("\x00\ud800") == "\\u0000\\ud800"
    assert visible("x" * 100) == "x" * 23 + "…"
    assert token("", 17) == "“” (id 17)"
    assert token("a", 17) == "“a”"


def test_figures_show_code_points_for_glyphs_that_the_font_lacks() -> None:
    assert drawable("é中") == "é⟨U+4E2D⟩"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", "a\\|b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("q_proj.input", "q_proj.input"),
        ("_x_ **y** `z`", "\\_x\\_ \\*\\*y\\*\\* \\`z\\`"),
        ("[a](https://b.c)", "\\[a\\](https\\://b.c)"),
        ("www.b.c $x$ a@b.c", "www\\.b.c \\$x\\$ a\\@b.c"),
        ("a\n# b", "a \\# b"),
    ],
)
def test_markdown_shows_the_text_and_nothing_else(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.parametrize(
    ("site", "kind", "block"),
    [
        ("model.layers.3.mlp.down_proj.input", "mlp.down_proj.input", 3),
        ("model.layers.12.output", BLOCK_OUTPUT, 12),
        ("transformer.h.0.attn.input", "attn.input", 0),
        ("model.layers.7.mlp.experts.63.down_proj.input", "mlp.experts.*.down_proj.input", 7),
        ("model.embed_tokens.output", "model.embed_tokens.output", None),
    ],
)
def test_sites_group_into_kinds(site: str, kind: str, block: int | None) -> None:
    assert (kind_of(site), block_of(site)) == (kind, block)


def test_json_is_plain_and_finite(llama: SimpleNamespace) -> None:
    from dataclasses import replace

    row = replace(llama.findings.sites[0], kurtosis=float("nan"), fp16_headroom=math.inf, std=np.float64(2.5))
    plain = findings_json(replace(llama.findings, sites=(row,)))
    loaded = json.loads(json_text(plain))
    assert loaded == plain
    assert loaded["sites"][0]["kurtosis"] is None
    assert loaded["sites"][0]["fp16_headroom"] is None
    assert loaded["sites"][0]["std"] == 2.5
    assert loaded["massive"]["channels"] == [[37, 12]]
    assert len(loaded["formats"]) == len(llama.findings.formats)
