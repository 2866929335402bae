"""Signed-gradient rounding: where it starts, where it may go, and that it finds something better there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.quantize.architectures import architecture_of, linear_names
from qtool.quantize.artifacts.network import NetworkShell, replace_module, run_block
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.rule import Rule
from qtool.quantize.artifacts.scheme import TensorScheme, layer_scheme
from qtool.quantize.inputs import open_model
from qtool.quantize.quantizers import QuantizationReport, quantize_model
from qtool.quantize.quantizers.block_refinement import (
    LOOKED_AT,
    Example,
    refine_block,
    relative_error,
    straight_through,
)
from qtool.quantize.quantizers.gptq import gptq
from qtool.quantize.quantizers.layers import quantize_linears
from qtool.quantize.quantizers.numerics import Grid, choose_grid, decode, encode
from qtool.quantize.quantizers.rtn import rtn
from qtool.quantize.quantizers.signed_rounding import Curvature, SignedRounding

SCHEMES: dict[str, TensorScheme] = {
    "groups": layer_scheme("W4A16", group_size=32).weight,
    "zero points": layer_scheme("W4A16", group_size=32, symmetric=False).weight,
    "channels": layer_scheme("W4A16", group_size="channel").weight,
    "8 bits": layer_scheme("W8A8").weight,
    "shift": layer_scheme("W4A16", group_size=32, scale="shift").weight,
}
FLAT = Curvature(rows=torch.zeros(24), columns=torch.zeros(80))
# Few different tokens, so that inputs are correlated, which is what rounding can make use of.
TOKENS = np.random.default_rng(0).integers(0, 12, (16, 48))
Make = Callable[..., Path]


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def rounded(weight: Tensor, scheme: TensorScheme) -> tuple[Tensor, Grid]:
    grid = choose_grid(weight, scheme, mse_clip=True)
    return encode(weight, grid, scheme), grid


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_it_starts_at_the_given_codes_even_far_from_the_nearest(scheme: TensorScheme) -> None:
    weight = drawn(24, 80)  # the last of the groups is short
    codes, grid = rounded(weight, scheme)
    moved = (codes.to(torch.int32) + torch.arange(24 * 80).reshape(24, 80) % 7 - 3).clamp(1, scheme.format.max_code)
    found, same = SignedRounding(weight, moved.to(codes.dtype), grid, scheme).result()
    assert torch.equal(found, moved.to(codes.dtype))
    assert torch.equal(same.scale, grid.scale)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_what_it_computes_with_is_what_it_returns(scheme: TensorScheme) -> None:
    weight = drawn(24, 80)
    rounding = SignedRounding(weight, *rounded(weight, scheme), scheme)
    for step in range(6):
        rounding.step(drawn(24, 80, seed=step), FLAT, 0.1)
    out = torch.full_like(weight, torch.nan)
    rounding.write_weight(out)
    codes, grid = rounding.result()
    assert torch.equal(out, decode(codes, grid, scheme))
    assert not torch.equal(codes, rounded(weight, scheme)[0])
    if scheme is SCHEMES["groups"]:
        assert torch.equal(grid.scale.half().float(), grid.scale)


def test_an_offset_travels_half_a_step_and_no_further() -> None:
    scheme = SCHEMES["shift"]  # whose scales stay
    weight = drawn(16, 64)
    codes, grid = rounded(weight, scheme)
    rounding = SignedRounding(weight, codes, grid, scheme)
    for _ in range(30):
        rounding.step(torch.ones(16, 64), Curvature(rows=torch.zeros(16), columns=torch.zeros(64)), 0.1)
    found, same = rounding.result()
    change = found.int() - codes.int()
    assert torch.equal(same.scale, grid.scale)
    assert change.max() <= 0 and change.min() == -1


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_it_finds_better_codes_for_a_linear(scheme: TensorScheme, start: str) -> None:
    inputs = drawn(200, 64) @ drawn(64, 64, seed=1)
    weight = drawn(48, 64, seed=2)
    options = Recipe.preset("W4A16", group_size=32).rules[0].options
    outcome = {"rtn": rtn, "gptq": gptq}[start](weight, (inputs.T @ inputs).double(), scheme, options)

    moment = inputs.T @ inputs
    curvature = Curvature(rows=torch.ones(48), columns=moment.diagonal())

    def error(value: Tensor) -> float:
        return float((((value - weight) @ moment) * (value - weight)).sum())

    before = error(decode(outcome.codes, outcome.grid, scheme))
    rounding, value = SignedRounding(weight, outcome.codes, outcome.grid, scheme), torch.empty_like(weight)
    for iteration in range(60):
        rounding.write_weight(value)
        rounding.step((value - weight) @ moment, curvature, (1 - iteration / 60) / 60)
    assert error(decode(*rounding.result(), scheme)) < (0.7 if start == "rtn" else 0.97) * before


def first_block(folder: Path, **rule: Any) -> tuple[nn.Module, dict[str, SignedRounding], list[Example]]:
    """A tiny model's first block with its linears rounded to nearest, where they start, and 16 sequences."""
    source = open_model(str(folder))
    shell = NetworkShell(source)
    tokens = torch.from_numpy(TOKENS[:, :40])
    assigned = Recipe.preset(rule.pop("scheme"), quantizer="rtn", **rule).assign(linear_names(source.config))
    examples, roundings = [], {}
    with torch.no_grad(), shell.block(0) as filled:
        for row in tokens:
            [(hidden, kwargs)] = shell.block_inputs([row[None]])
            target = run_block(filled, hidden, kwargs[0])
            examples.append(Example(hidden=hidden, kwargs=kwargs[0], target=target))
        block = copy.deepcopy(filled)
        for path in [path for group in architecture_of(source.config).linear_groups for path in group]:
            module = f"model.layers.0.{path}"
            weight = filled.get_submodule(path).weight.data
            tensor = quantize_linears([assigned[module]], {module: weight}, None, {})[module].tensor
            main = weight if tensor.transform is None else tensor.transform.weight(weight)[0]
            grid = Grid(scale=tensor.scale, zero_point=tensor.zero_point)
            roundings[path] = SignedRounding(main, tensor.codes, grid, tensor.scheme.weight)
            replace_module(block, path, lambda old, t=tensor: QuantizedLinear(t, old.bias))
    return block, roundings, examples


RULES: dict[str, dict[str, Any]] = {
    "W4A16": {"scheme": "W4A16", "group_size": 32},
    "W4A8": {"scheme": "W4A8", "group_size": 32, "activation": "per_token"},
    "W4A4 hadamard": {"scheme": "W4A4", "group_size": 32, "transform": "hadamard"},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_block_gets_better_on_sequences_it_did_not_see(tiny_model: Make, rule: dict[str, Any]) -> None:
    block, roundings, examples = first_block(tiny_model(), **rule)

    def error(over: list[Example]) -> float:
        with torch.no_grad():
            return sum(float(relative_error(run_block(block, e.hidden, e.kwargs), e.target)) for e in over) / len(over)

    seen, unseen = examples[:12], examples[12:]
    before = error(unseen)
    found = refine_block(block, roundings, seen, iterations=40, batch=1, seed=0)
    for path, (codes, grid) in found.results.items():
        linear = block.get_submodule(path)
        linear.weight.data = decode(codes, grid, layer_scheme("W4A16", group_size=32).weight)
    assert error(unseen) < 0.8 * before
    assert error(seen[::LOOKED_AT]) == pytest.approx(found.after, rel=1e-5)
    assert found.after < found.before


def test_the_same_seed_gives_the_same_codes_and_another_seed_others(tiny_model: Make) -> None:
    def codes(seed: int) -> list[Tensor]:
        block, roundings, examples = first_block(tiny_model(), **RULES["W4A8"])
        found = refine_block(block, roundings, examples, iterations=24, batch=2, seed=seed)
        return [codes for codes, _ in found.results.values()]

    first = codes(1)
    assert all(torch.equal(a, b) for a, b in zip(first, codes(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, codes(2), strict=True))


def test_an_iterate_that_is_worse_is_not_kept(tiny_model: Make) -> None:
    block, roundings, examples = first_block(tiny_model(), **RULES["W4A8"])
    with torch.no_grad(), straight_through(block):
        targets = [replace(e, target=run_block(block, e.hidden, e.kwargs)) for e in examples]
    start = {path: rounding.result()[0] for path, rounding in roundings.items()}
    found = refine_block(block, roundings, targets, iterations=8, batch=1, seed=0)
    assert found.before == found.after == 0
    assert all(torch.equal(start[path], codes) for path, (codes, _) in found.results.items())


def test_gradients_pass_quantized_inputs_unchanged(tiny_model: Make) -> None:
    block, roundings, _ = first_block(tiny_model(), **RULES["W4A8"])
    linear = block.get_submodule(next(iter(roundings)))
    assert isinstance(linear, QuantizedLinear)
    own = linear.quantize
    x = drawn(5, linear.weight.shape[1]).requires_grad_(True)
    with straight_through(block):
        y = linear(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, linear(x.detach()))
    torch.testing.assert_close(gradient, linear.weight.sum(dim=0).expand(5, -1))
    assert linear.quantize is own


def quantized(folder: Path, **rule: Any) -> tuple[dict[str, QuantizedTensor], QuantizationReport]:
    """A tiny model through the pipeline on 16 sequences."""
    head = rule.pop("lm_head", "float")
    return run(folder, Recipe.preset(rule.pop("scheme", "W4A8"), group_size=32, lm_head=head, **rule))


def run(folder: Path, recipe: Recipe) -> tuple[dict[str, QuantizedTensor], QuantizationReport]:
    """What a recipe makes of a model."""
    source = open_model(str(folder))
    written: dict[str, QuantizedTensor] = {}

    class Writer:
        def add(self, quantized: dict[str, QuantizedTensor], floats: dict[str, Tensor]) -> None:
            written.update(quantized)

    report = quantize_model(
        source,
        assignments=recipe.assign(linear_names(source.config)),
        groups=architecture_of(source.config).linear_groups,
        tokens=TOKENS,
        statistics=None,
        writer=Writer(),  # type: ignore[arg-type]
        progress=lambda done, total, text: None,
    )
    return written, report


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_recipe_refines_what_gptq_left(tiny_model: Make, family: str) -> None:
    folder, options = tiny_model(family), {"iterations": 32}
    refined, report = quantized(folder, quantizer="autoround", options=options)
    left, plain = quantized(folder, quantizer="gptq")
    assert refined.keys() == left.keys()
    assert not all(torch.equal(refined[module].codes, left[module].codes) for module in left)
    again, _ = quantized(folder, quantizer="autoround", options=options)
    assert all(torch.equal(refined[module].codes, again[module].codes) for module in refined)
    assert all(torch.equal(refined[module].scale, again[module].scale) for module in refined)
    shares = [record.refined for record in report.layers.values()]
    assert all(share is not None and share <= 1 for share in shares) and min(map(float, shares)) < 0.99
    assert all(record.refined is None for record in plain.layers.values())


def test_only_the_linears_of_its_rule_are_refined(tiny_model: Make) -> None:
    folder = tiny_model()
    rules = [
        {"match": "*", "scheme": "W4A8", "group_size": 32, "quantizer": "gptq"},
        {"match": "*.mlp.*", "scheme": "W4A8", "group_size": 32, "quantizer": "autoround"},
    ]
    recipe = Recipe.from_data({"ignore": ["lm_head"], "rules": rules})
    left, _ = quantized(folder, quantizer="gptq")
    written, report = run(folder, recipe)
    first = [m for m in written if m.startswith("model.layers.0.")]
    changed = {m for m in first if not torch.equal(written[m].codes, left[m].codes)}
    assert changed and all(".mlp." in module for module in changed)
    assert {m for m, r in report.layers.items() if r.refined is not None} == {m for m in written if ".mlp." in m}


def test_the_side_product_of_quad_stays_and_the_rest_is_refined(tiny_model: Make) -> None:
    folder, rule = tiny_model(), {"scheme": "W4A4", "transform": "quad", "rank": 8, "low_rank": 4}
    refined, _ = quantized(folder, quantizer="autoround", options={"iterations": 12}, **rule)
    left, _ = quantized(folder, quantizer="gptq", **rule)
    first = [module for module in left if module.startswith("model.layers.0.self_attn.q")]
    for module in first:
        a, b = refined[module], left[module]
        assert a.side is not None and b.side is not None and a.low_rank is not None and b.low_rank is not None
        assert torch.equal(a.side, b.side) and torch.equal(a.low_rank.up, b.low_rank.up)
        assert not torch.equal(a.codes, b.codes)


def test_a_head_is_in_no_block(tiny_model: Make) -> None:
    folder, options = tiny_model(tied=False), {"iterations": 1}
    written, report = quantized(folder, quantizer="autoround", lm_head="W8A8", options=options)
    assert "lm_head" in written
    assert report.layers["lm_head"].quantizer == "gptq"
    assert any("lm_head is in no block" in note for note in report.notes)


def test_float_formats_are_refused() -> None:
    with pytest.raises(UsageError, match="integer weights only"):
        Recipe.preset("MXFP4", quantizer="autoround")
    first = {"match": "*", "scheme": "W4A8", "quantizer": "autoround"}
    second = {"match": "*.o_proj", "scheme": "W4A8_FP", "quantizer": "autoround"}
    with pytest.raises(UsageError, match="autoround with W4A8_FP"):
        Recipe.from_data({"rules": [first, second]})
    # A rule that was put together past the recipe's own check is met by the assignment.
    recipe = Recipe.from_data({"rules": [first]})
    past = recipe.model_copy(update={"rules": (Rule.model_validate(second),)})
    with pytest.raises(UsageError, match="integer weights only"):
        past.assign(["model.layers.0.self_attn.o_proj"])
