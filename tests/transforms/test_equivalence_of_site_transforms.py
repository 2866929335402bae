"""Every online transform alone, in front of every linear of a model, leaves the logits where they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qtool.quantize.architectures import ARCHITECTURES
from qtool.quantize.artifacts.network import load_network, replace_module
from qtool.quantize.inputs import open_model
from qtool.quantize.transforms.block_hadamard import BlockHadamard
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.low_rank import low_rank
from qtool.quantize.transforms.quad import quad
from qtool.quantize.transforms.site_transform import SiteTransform

Wild = Callable[..., Path]
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 250
BOUND = 1e-4  # of the logits' range; 1e-3 is asked for


def moment(width: int) -> Tensor:
    rows = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(width)).double()
    rows[:, 3] *= 30
    return rows.T @ rows


MAKE: dict[str, Callable[[int], SiteTransform]] = {
    "block Hadamard (R4)": lambda width: BlockHadamard.random(width, seed=1, stream="site", block=16),
    "QUAD, per site": lambda width: quad(moment(width), 8, seed=1, stream="site", block=16),
    "division of channels": lambda width: DivideChannels(factors=torch.linspace(0.1, 9.0, width)),
}


class Behind(nn.Module):
    """A float linear behind a transform: the sum of its main and side products."""

    def __init__(self, float_linear: nn.Linear, transform: SiteTransform) -> None:
        super().__init__()
        self.transform, self.bias = transform, float_linear.bias
        self.main, self.side = transform.weight(float_linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        main, side = self.transform.input(x)
        y = linear(main, self.main, self.bias)
        return y if side is None or self.side is None else y + side @ self.side.T


class Corrected(nn.Module):
    """A linear with a coarse weight and a correction of full rank."""

    def __init__(self, float_linear: nn.Linear) -> None:
        super().__init__()
        weight = float_linear.weight
        self.coarse, self.bias = (weight * 8).round() / 8, float_linear.bias
        self.correction = low_rank(weight - self.coarse, min(weight.shape), moment(weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.coarse, self.bias) + self.correction.output(x)


WRAP: dict[str, Callable[[nn.Linear], nn.Module]] = {
    **{name: lambda old, make=make: Behind(old, make(old.in_features)) for name, make in MAKE.items()},
    "low rank": Corrected,
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_stay(family: str, wild_folder: Wild) -> None:
    source = open_model(str(wild_folder(family)))
    with torch.no_grad():
        before = load_network(source)(TOKENS).logits
        for name, wrap in WRAP.items():
            network = load_network(source)
            linears = [
                path
                for path, module in network.named_modules()
                if isinstance(module, nn.Linear) and module.in_features % 16 == 0 and "head" not in path
            ]
            assert len(linears) >= 2
            for path in linears:
                replace_module(network, path, wrap)  # type: ignore[arg-type]
            moved = (network(TOKENS).logits - before).abs().max()
            assert moved / (before.max() - before.min()) < BOUND, name
