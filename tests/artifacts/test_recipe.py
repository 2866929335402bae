"""Recipes: what is refused with which words, and which rule wins."""

from __future__ import annotations

from typing import Any

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.recipe import Recipe

PATHS = ("self_attn.q_proj", "mlp.down_proj")
MODULES = [f"model.layers.{i}.{path}" for i in range(12) for path in PATHS] + ["lm_head"]
RULE = {"match": "*", "scheme": "W4A8"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rules": [{**RULE, "quantiser": "rtn"}]}, "quantizer"),
        ({"rules": [RULE], "ignored": []}, "did you mean ignore"),
        ({"rules": [{**RULE, "options": {"damping": 0.1}}]}, "did you mean damp"),
        ({"rules": [{**RULE, "quantizer": "gtpq"}]}, "did you mean gptq"),
        ({"rules": [{**RULE, "scheme": "W4A9"}]}, "W4A8"),
        ({"rules": [{**RULE, "group_size": 48}]}, "32, 64, 128"),
        ({"rules": [{**RULE, "activation": "per_tokens"}]}, "per_token"),
        ({"rules": [{**RULE, "options": {"damp": 0.0}}]}, "damp"),
        ({"rules": [{**RULE, "symmetric": "yes"}]}, "symmetric"),
        ({"rules": [{"match": "*"}]}, "scheme: missing"),
        ({"rules": []}, "rules"),
        ({"rules": [RULE], "version": 2}, "newer qtool"),
        ({"rules": [{**RULE, "match": "re:("}]}, "regular expression"),
        ({"rules": [RULE], "ignore": ["re:["]}, "regular expression"),
        ({"rules": [{"match": "*", "scheme": "FP8_DYNAMIC", "group_size": 64}]}, "one scale per channel"),
        ({"rules": [{"match": "*", "scheme": "FP8_DYNAMIC", "symmetric": False}]}, "no zero point"),
        ({"rules": [{"match": "*", "scheme": "W4A16", "activation": "per_token"}]}, "no quantized activations"),
        ({"rules": [{"match": "*", "scheme": "W8A8", "activation": "per_token_group"}]}, "in groups"),
        ([], "not a mapping"),
    ],
)
def test_refusals_name_the_field_and_the_nearest(data: Any, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        Recipe.from_data(data)
    assert words in refused.value.line()


def test_the_last_match_wins_and_ignore_wins_over_all() -> None:
    rules = [
        RULE,
        {"match": ["*.q_proj", "lm_head"], "scheme": "W8A8"},
        {"match": r"re:model\.layers\.1[01]\..*q_proj", "scheme": "FP8_DYNAMIC", "quantizer": "rtn"},
    ]
    assigned = Recipe.from_data({"rules": rules, "ignore": ["model.layers.11.self_attn.q_proj"]}).assign(MODULES)
    assert list(assigned) == MODULES
    schemes = {m: str(a.scheme) for m, a in assigned.items()}
    assert schemes["model.layers.1.mlp.down_proj"].startswith("W4A8 g64")
    assert schemes["model.layers.1.self_attn.q_proj"].startswith("W8A8") and schemes["lm_head"].startswith("W8A8")
    assert schemes["model.layers.10.self_attn.q_proj"].startswith("FP8")
    assert assigned["model.layers.10.self_attn.q_proj"].quantizer == "rtn"
    left = assigned["model.layers.11.self_attn.q_proj"]
    assert left.scheme is None and "model.layers.11" in left.reason


def test_a_regular_expression_matches_the_whole_name() -> None:
    assigned = Recipe.preset("W4A8", ignore=[r"re:model\.layers\.1\..*"]).assign(MODULES)
    assert {m for m, a in assigned.items() if a.scheme is None} == {m for m in MODULES if ".layers.1." in m}


@pytest.mark.parametrize("where", ["ignore", "match"])
def test_an_idle_pattern_is_refused(where: str) -> None:
    idle = "model.layers.1.self_attn.q_prj"
    data: dict[str, Any] = {"rules": [RULE]}
    if where == "ignore":
        data["ignore"] = [idle]
    else:
        data["rules"] = [RULE, {"match": ["lm_head", idle], "scheme": "W8A8"}]
    with pytest.raises(UsageError) as refused:
        Recipe.from_data(data).assign(MODULES)
    assert idle in refused.value.line() and "did you mean model.layers.1.self_attn.q_proj" in refused.value.line()


def test_a_pattern_that_later_rules_overrule_is_not_idle() -> None:
    rules = [{"match": "*.q_proj", "scheme": "W8A8"}, RULE]
    assert Recipe.from_data({"rules": rules, "ignore": ["lm_head"]}).assign(MODULES)["lm_head"].scheme is None


def test_nothing_quantized_is_refused_and_no_rule_is_a_reason() -> None:
    with pytest.raises(UsageError, match="no linear"):
        Recipe.preset("W4A8", ignore=["*"]).assign(MODULES)
    assigned = Recipe.from_data({"rules": [{"match": "*.q_proj", "scheme": "W4A8"}]}).assign(MODULES)
    assert assigned["lm_head"].reason == "no rule matches"


def test_plain_data_reads_back_equal() -> None:
    recipe = Recipe.from_data(
        {
            "seed": 5,
            "ignore": ["lm_head"],
            "rules": [{"match": ["a*", "re:b"], "scheme": "W4A8", "group_size": "channel", "activation": "per_token"}],
        }
    )
    assert Recipe.from_data(recipe.to_data()) == recipe
    assert Recipe.from_data(recipe.to_data()).digest == recipe.digest
    assert recipe.digest != Recipe.preset("W4A8").digest
