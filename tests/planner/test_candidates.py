"""Candidates: every one of them is a rule that can be computed, for whatever was asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.quantize.architectures import architecture_of, linear_names
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.scheme import PRESETS
from qtool.quantize.inputs import open_model
from qtool.quantize.planner.candidates import AS_ASKED, assignments_by_candidate, candidates, changed
from qtool.quantize.planner.decide import SiteTrials
from qtool.quantize.planner.plan import try_sites

Make = Callable[..., Path]
MODULES = [f"model.layers.{i}.{path}" for i in range(2) for path in ("self_attn.q_proj", "mlp.down_proj")]
TRANSFORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "hadamard": {"transform": "hadamard"},
    "quad": {"transform": "quad", "rank": 16},
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "zero points": ("W4A8", {"symmetric": False}),
    "static": ("W8A8", {"activation": "per_tensor"}),
    "static FP8": ("FP8_DYNAMIC", {"activation": "per_tensor"}),
    "powers of two": ("W4A8", {"scale": "e8m0", "group_size": 32}),
    "shifts": ("W4A4", {"scale": "shift"}),
    "integers": ("W4A8", {"scale": "integer", "symmetric": False}),
    "per request": ("W4A4", {"runtime_smooth": "robust"}),
    "frozen": ("W4A4", {"runtime_smooth": "frozen", "activation_clip": 0.9}),
    "refined": ("W4A8", {"quantizer": "autoround"}),
    "per channel": ("W4A8", {"group_size": "channel", "activation": "per_token"}),
    "corrected": ("W4A16", {"low_rank": 16}),
    "corrected integers": ("W4A8", {"low_rank": 16}),
    "searched": ("W4A8", {"model": ["smooth"], "smooth_search": "aqas"}),
}
ASKED = {
    **{f"{scheme}, {name}": (scheme, rule) for scheme in PRESETS for name, rule in TRANSFORMS.items()},
    **{f"{name}, none": asked for name, asked in MORE.items()},
    **{f"{name}, quad": (scheme, {**rule, **TRANSFORMS["quad"]}) for name, (scheme, rule) in MORE.items()},
}
del ASKED["searched, quad"]  # refused for itself


@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
@pytest.mark.parametrize("name", ASKED)
def test_every_candidate_can_be_assigned_and_written_down(name: str, mixed: bool) -> None:
    scheme, rule = ASKED[name]
    asked = Recipe.preset(scheme, lm_head="float", **rule)
    found = candidates(asked, mixed=mixed)
    assignments = assignments_by_candidate(asked, found, [*MODULES, "lm_head"])
    assert found[0].name == AS_ASKED and assignments[AS_ASKED] == asked.assign([*MODULES, "lm_head"])
    assert len(assignments) == len(found) >= 4
    decided = [each[MODULES[0]] for each in assignments.values()]
    assert all(decided[i] != decided[j] for i in range(len(decided)) for j in range(i))
    for candidate in found:
        written = changed(asked.rules[0], MODULES[:2], candidate.fields).model_dump(mode="json")
        again = Recipe.from_data({**asked.to_data(), "rules": [*asked.to_data()["rules"], written]})
        assert again.assign([*MODULES, "lm_head"])[MODULES[0]] == assignments[candidate.name][MODULES[0]]


def test_floats_are_offered_the_directions_that_integers_are() -> None:
    def offered(scheme: str) -> set[str]:
        return {c.name for c in candidates(Recipe.preset(scheme))}

    assert offered("FP8_DYNAMIC") == offered("W4A8_FP") == offered("W8A8") and "quad 32" in offered("FP8_DYNAMIC")
    assert offered("MXFP4") == offered("W4A4") and "quad 64" in offered("MXFP4")


def test_what_was_asked_can_be_left_out_again() -> None:
    plain = {c.name: c for c in candidates(Recipe.preset("W4A8", transform="quad", rank=8))}["plain"]
    assert plain.fields == {"transform": None, "low_rank": 0}
    assert "plain" not in {c.name for c in candidates(Recipe.preset("W4A8"))}


def test_a_correction_has_to_earn_its_bits_beside_every_transform() -> None:
    found = {c.name: c.fields for c in candidates(Recipe.preset("W4A8", lm_head="float", low_rank=16))}
    assert found["quad 8"] == {"transform": "quad", "rank": 8}  # the correction of the rule stays
    assert found["quad 8, no low rank"] == {"transform": "quad", "rank": 8, "low_rank": 0}
    assert "as asked, no low rank" not in found and found["plain"]["low_rank"] == 0
    asked = Recipe.preset("W4A8", lm_head="float", low_rank=16, transform="hadamard")
    assert "as asked, no low rank" in {c.name for c in candidates(asked)}


def test_finer_groups_are_offered_with_every_transform_where_the_plan_may_mix() -> None:
    asked = Recipe.preset("W4A8", activation="per_token")
    names = {c.name: c.fields for c in candidates(asked, mixed=True)}
    assert names["as asked, groups of 32"] == {"group_size": 32}
    assert names["quad 16, groups of 32"] == {"transform": "quad", "rank": 16, "group_size": 32}
    assert not [name for name in {c.name for c in candidates(asked)} if "groups" in name]
    for group in (32, "channel"):
        coarse = Recipe.preset("W4A8", activation="per_token", group_size=group)
        assert not [c.name for c in candidates(coarse, mixed=True) if "groups" in c.name]


@pytest.mark.parametrize(
    ("scheme", "eight", "input_bits"), [("W4A8", "W8A8", 8), ("W4A4", "W8A8", 8), ("W4A16", "W8A16", None)]
)
def test_eight_bits_leave_float_activations_alone(scheme: str, eight: str, input_bits: int | None) -> None:
    asked = Recipe.preset(scheme, lm_head="float")
    found = [c for c in candidates(asked, mixed=True) if c.name == eight]
    assigned = assignments_by_candidate(asked, found, [*MODULES, "lm_head"])[eight][MODULES[0]].scheme
    assert assigned is not None and assigned.weight.format.bits == 8
    assert (None if assigned.input is None else assigned.input.format.bits) == input_bits


def test_a_model_whose_widths_allow_no_transform_is_offered_none() -> None:
    asked = Recipe.preset("W4A4")
    assert {c.name for c in candidates(asked, widths=(64, 100))} == {AS_ASKED, f"{AS_ASKED}, rtn"}
    assert "quad 64" not in {c.name for c in candidates(asked, widths=(32, 64))}
    assert "quad 32" in {c.name for c in candidates(asked, widths=(32, 64))}


def test_directions_are_not_searched_together_with_smoothing_scales() -> None:
    names = {c.name for c in candidates(Recipe.preset("W4A8", model=["smooth"], smooth_search="awq"))}
    assert "hadamard" in names and not any("quad" in name for name in names)
    assert any("quad" in c.name for c in candidates(Recipe.preset("W4A8", model=["smooth"])))


def tried(folder: Path, asked: Recipe, *, mixed: bool = False) -> list[SiteTrials]:
    source = open_model(str(folder))
    tokens = np.random.default_rng(0).integers(0, 256, (8, 24))
    groups = architecture_of(source.config).linear_groups
    asked.assign(linear_names(source.config))
    return try_sites(source, asked, groups, tokens, mixed=mixed, progress=lambda done, total, name: None)


@pytest.mark.parametrize("name", ["static", "static FP8", "frozen", "per request", "MXFP4, hadamard", "NVFP4, quad"])
def test_sites_are_tried_with_ranges_factors_and_blocks(tiny_model: Make, name: str) -> None:
    scheme, rule = {**MORE, **ASKED}[name]
    if scheme == "W4A4":
        rule = {**rule, "group_size": 32}
    sites = tried(tiny_model("llama", num_hidden_layers=1), Recipe.preset(scheme, lm_head="float", **rule), mixed=True)
    assert len(sites) == 4
    for site in sites:
        assert all(math.isfinite(trial.kl_nats) and 0 < trial.output_error < 0.5 for trial in site.trials)


def test_linears_of_one_site_are_tried_each_with_its_own_scheme(tiny_model: Make) -> None:
    folder = tiny_model("llama", num_hidden_layers=1)
    weights = {"match": "*", "scheme": "W4A16", "group_size": 32, "quantizer": "rtn"}
    others = {"match": ["*.k_proj", "*.v_proj"], "scheme": "W4A4", "group_size": 32, "quantizer": "rtn"}
    float_inputs, mixed_inputs = (
        tried(folder, Recipe.from_data({"rules": rules, "ignore": ["lm_head"]}))[0].trials[0].output_error
        for rules in ([weights], [weights, others])
    )
    assert mixed_inputs > 1.5 * float_inputs
