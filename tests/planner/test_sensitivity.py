"""What gradients predict of an error's cost, against the KL that the whole model really shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.inputs import open_model
from qtool.quantize.planner.sensitivity import SiteInput, site_inputs

Make = Callable[..., Path]
DRAW = np.random.default_rng(0)
FITTED = DRAW.integers(0, 256, (2, 24))
JUDGED = DRAW.integers(0, 256, (40, 24))
DICE = torch.Generator().manual_seed(0)


def sites_of(folder: Path) -> list[SiteInput]:
    source = open_model(str(folder))
    groups = architecture_of(source.config).linear_groups
    return [site for block in site_inputs(source, groups, FITTED, JUDGED, seed=0) for site in block]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_prediction_is_the_kl_that_the_model_shows(tiny_model: Make, family: str) -> None:
    folder = tiny_model(family)
    network = load_network(open_model(str(folder)))
    with torch.no_grad():
        before = network(torch.from_numpy(JUDGED)).logits.log_softmax(-1)
        for site in sites_of(folder):
            module = site.modules[-1]
            linear = network.get_submodule(module)
            noise = 0.05 * torch.randn((*JUDGED.shape, linear.out_features), generator=DICE)
            handle = linear.register_forward_hook(lambda m, args, y, noise=noise: y + noise)
            after = network(torch.from_numpy(JUDGED)).logits.log_softmax(-1)
            handle.remove()
            measured = float(kl_div(after, before, log_target=True, reduction="none").sum(-1).mean())
            moved = (noise * torch.cat(site.gradients[module])).sum(-1)
            # One label a token is drawn: 960 tokens leave some noise of their own.
            assert float(moved.square().mean()) / 2 == pytest.approx(measured, rel=0.3), module


def test_inputs_and_second_moments_are_those_of_a_plain_pass(tiny_model: Make) -> None:
    folder = tiny_model("llama")
    network = load_network(open_model(str(folder)))
    sites = sites_of(folder)
    assert len(sites) == 2 * 4
    assert sites[0].modules[0].startswith("model.layers.1.")  # last block first
    caught: dict[str, list[torch.Tensor]] = {}
    for site in sites:
        first = site.modules[0]
        network.get_submodule(first).register_forward_pre_hook(
            lambda module, args, first=first: caught.setdefault(first, []).append(args[0])
        )
    with torch.no_grad():
        network(torch.from_numpy(JUDGED))
        network(torch.from_numpy(FITTED))
    for site in sites:
        judged, fitted = caught[site.modules[0]]
        torch.testing.assert_close(torch.cat(site.inputs), judged, rtol=1e-4, atol=1e-5)
        rows = fitted.flatten(0, 1).double()
        torch.testing.assert_close(site.hessian, rows.T @ rows, rtol=1e-4, atol=1e-4)
        for module in site.modules:
            assert site.weights[module].equal(network.get_submodule(module).weight)
            assert sum(g.numel() for g in site.gradients[module]) == JUDGED.size * len(site.weights[module])


def test_the_same_seed_gives_the_same_gradients(tiny_model: Make) -> None:
    folder = tiny_model("llama")
    first, again = sites_of(folder), sites_of(folder)
    for a, b in zip(first, again, strict=True):
        assert all(x.equal(y) for m in a.modules for x, y in zip(a.gradients[m], b.gradients[m], strict=True))
