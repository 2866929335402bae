"""Every transform leaves every family's logits where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.architectures import ARCHITECTURES, tensor_shapes
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.inputs import open_model
from qtool.quantize.transforms import TransformedSource, fold_norms, rotate, smooth, smoothable_sites
from qtool.quantize.transforms.smoothing import tie_heads
from qtool.quantize.transforms.transformed_source import Changes
from qtool.quantize.transforms.wiring import EdgePlace

Wild = Callable[..., Path]
Logits = Callable[[Any], Tensor]
SANDWICH = ("gemma2", "gemma3_text")
STATE_SPACE = ("mamba", "mamba2")
# The bound asked for is 1e-3 of the range; float32 itself moves these models by less than 5e-6.
BOUND = 2e-5


def smooth_everywhere(source: WeightSource) -> TransformedSource:
    """Random factors from 0.1 to 10 at every site."""
    draw, factors, seen = np.random.default_rng(0), {}, set()
    for site, place in sorted(smoothable_sites(source.config).items()):
        if id(place) in seen:
            continue
        seen.add(id(place))
        if not isinstance(place, EdgePlace):
            factors[site] = 10 ** draw.uniform(-1, 1, source.config["hidden_size"])
            continue
        given = 10 ** draw.uniform(-1, 1, (place.stop - place.start) * place.repeats)
        tied = place.kind == "values"
        factors[site] = tie_heads(given, repeats=place.repeats, head_dim=place.head_dim) if tied else given
    return smooth(source, factors)


TRANSFORMS: dict[str, Callable[[WeightSource], TransformedSource]] = {
    "fold_norms": fold_norms,
    "smooth": smooth_everywhere,
    "R1": lambda source: rotate(fold_norms(source), values=False),
    "R1 in blocks": lambda source: rotate(fold_norms(source), values=False, block=16),
    "R2": lambda source: rotate(source, residual=False),
    "fold, R1 and R2": lambda source: rotate(fold_norms(source), seed=5),
    "smooth, fold, R1 and R2, smooth": lambda source: smooth_everywhere(rotate(fold_norms(smooth_everywhere(source)))),
}
REFUSED = {
    **{(family, name): "R1" for family in SANDWICH for name in TRANSFORMS if "R1" in name},
    **{(family, name): "R2" for family in STATE_SPACE for name in TRANSFORMS if "R2" in name},
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_stay(family: str, wild_folder: Wild, logits_of: Logits) -> None:
    source = open_model(str(wild_folder(family)))
    before = logits_of(source)
    spread = before.max() - before.min()
    assert spread > 1
    for name, transform in TRANSFORMS.items():
        if (family, name) in REFUSED:
            with pytest.raises(InputRefused, match=REFUSED[family, name]):
                transform(source)
            continue
        transformed = transform(source)
        assert (logits_of(transformed) - before).abs().max() / spread < BOUND, name
        shapes = {tensor: transformed.read(tensor).shape for tensor in transformed.names()}
        assert shapes == tensor_shapes(transformed.config), name


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_logits_stay_with_a_head_of_its_own(family: str, wild_folder: Wild, logits_of: Logits) -> None:
    source = open_model(str(wild_folder(family, tied=False)))
    before = logits_of(source)
    after = logits_of(rotate(fold_norms(source)))
    assert (after - before).abs().max() / (before.max() - before.min()) < BOUND


def test_logits_stay_without_any_bias_to_take_a_layer_norms(wild_folder: Wild, logits_of: Logits) -> None:
    source = open_model(str(wild_folder("opt", enable_bias=False)))
    before = logits_of(source)
    for transform in (fold_norms, TRANSFORMS["fold, R1 and R2"]):
        after = logits_of(transform(source))
        assert (after - before).abs().max() / (before.max() - before.min()) < BOUND


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe", "opt"])
def test_a_forgotten_tensor_is_noticed(family: str, wild_folder: Wild, logits_of: Logits) -> None:
    """Guards the tests above: with one changed tensor as it was, the logits move far."""
    all_chosen = {"num_experts_per_tok": 4} if family == "qwen3_moe" else {}
    source = open_model(str(wild_folder(family, **all_chosen)))
    before = logits_of(source)
    whole = rotate(fold_norms(source))
    changed = [name for name in source.names() if (source.read(name) != whole.read(name)).any()]
    assert len(changed) > 0.7 * len(source.names())
    missed = []
    for name in changed:
        part = TransformedSource(whole, _keeping(name, source), description={})
        if (logits_of(part) - before).abs().max() / (before.max() - before.min()) < 10 * BOUND:
            missed.append(name)
    # Keys without rotary positions: what a bias adds to all scores of a query, softmax takes away.
    assert missed == ([name for name in changed if name.endswith("k_proj.bias")] if family == "opt" else [])


def _keeping(name: str, source: WeightSource) -> Changes:
    changes, original = Changes(frozenset(source.names())), source.read(name).astype(np.float64)
    change = changes.columns if original.ndim == 2 else changes.rows
    change(name, lambda _: original)
    return changes
