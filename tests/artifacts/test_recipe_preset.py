"""The recipe behind `--scheme`: what the head gets when nobody says."""

from __future__ import annotations

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.recipe import Recipe

MODULES = ["model.layers.0.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize(
    ("scheme", "options", "head"),
    [
        ("W4A8", {}, "W8A8 g64 act per_token_group"),
        ("W4A8", {"group_size": 32, "activation": "per_token"}, "W8A8 g32 act per_token"),
        ("W4A8", {"lm_head": "W4A8"}, "W4A8 g64 act per_token_group"),
        ("W4A8", {"lm_head": "float"}, "None"),
        ("W4A16", {"group_size": "channel", "lm_head": "W8A16"}, "W8A16 per channel"),
        ("W4A8", {"activation": "per_token", "lm_head": "W8A16"}, "W8A16 g64"),
        ("W8A8", {}, "W8A8 per channel act per_token"),
        ("W4A16", {}, "None"),
        ("FP8_DYNAMIC", {}, "None"),
        ("W4A8", {"ignore": ["lm_head"]}, "None"),
        ("W4A8_FP", {"scale": "shift", "lm_head": "W8A8"}, "W8A8 g64 act per_token"),
        ("NVFP4", {"lm_head": "W8A8"}, "W8A8 g16 act per_token_group"),
    ],
)
def test_the_head(scheme: str, options: dict[str, object], head: str) -> None:
    recipe = Recipe.preset(scheme, **options)  # type: ignore[arg-type]
    assert str(recipe.assign(MODULES)["lm_head"].scheme) == head
    assert recipe.assign(MODULES)[MODULES[0]].scheme is not None


def test_unknown_schemes_are_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="W4A8"):
        Recipe.preset("W4A9")
    with pytest.raises(UsageError, match="W4A8"):
        Recipe.preset("W4A8", lm_head="W4A9")
