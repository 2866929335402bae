"""Checkpoints with transforms and side products, without calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels.small_floats import e2m1_codes, round_e2m1
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme
from qtool.quantize.transforms.block_hadamard import BlockHadamard
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.low_rank import low_rank
from qtool.quantize.transforms.quad import quad
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.then_divide import ThenDivide

SITES = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}


def site_of(module: str) -> str:
    """The name of the input that a linear reads."""
    block, _, leaf = module.rpartition(".")
    return f"{block}.{SITES.get(leaf, leaf)}"


def transform_of(kind: str, site: str, width: int) -> SiteTransform | None:
    """A transform of this kind for a site, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(len(site) * 1000 + width)
    rotation = BlockHadamard.random(width, seed=0, stream=site)
    division = DivideChannels(factors=torch.rand(width, generator=generator) * 2 + 0.5)
    if "quad" in kind:
        rows = torch.randn(4 * width, width, generator=generator) * (1 + 5 * torch.rand(width, generator=generator))
        return quad((rows.T @ rows).double(), 8, seed=0, stream=site)
    kinds: dict[str, SiteTransform] = {
        "hadamard": rotation,
        "divide": division,
        "hadamard then divide": ThenDivide(first=rotation, division=division),
    }
    return kinds.get(kind)


@pytest.fixture(scope="session")
def transformed(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
) -> Callable[[str, Tensor, LayerScheme, str], QuantizedTensor]:
    """transformed(module, weight, scheme, kind of transform): rounded to nearest behind the transform."""

    def make(module: str, weight: Tensor, scheme: LayerScheme, kind: str) -> QuantizedTensor:
        site = site_of(module)
        transform = transform_of(kind, site, weight.shape[1])
        main, side = (weight, None) if transform is None else transform.weight(weight)
        tensor = round_nearest(main, scheme)
        if side is not None:
            side = side.to(torch.float16).to(torch.float32)
        low = low_rank(main - tensor.dequantize(), 4) if "low rank" in kind else None
        if low is not None:
            low = replace(low, up=low.up.half().float(), down=low.down.half().float())
        return replace(tensor, transform=transform, site=site if transform else "", side=side, low_rank=low)

    return make


@pytest.fixture(scope="session")
def make_transformed(
    make_source: Callable[..., Any],
    quantize_blocks: Callable[..., QuantizedCheckpoint],
    transformed: Callable[..., QuantizedTensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., QuantizedCheckpoint]:
    """make_transformed(kind, scheme name, family=…, **scheme options): all linears but the head."""

    def make(kind: str, name: str, *, family: str = "llama", **options: Any) -> QuantizedCheckpoint:
        source = make_source(family)
        output: Path = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
        scheme = layer_scheme(name, **options)
        return quantize_blocks(
            source, output, scheme, lambda module, weight, given: transformed(module, weight, given, kind)
        )

    return make


@pytest.fixture(scope="session")
def make_small_float(
    make_source: Callable[..., Any],
    quantize_blocks: Callable[..., QuantizedCheckpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., QuantizedCheckpoint]:
    """make_small_float(scheme name, family=…, tied=…, **scheme options): E2M1 weights in all linears but the head."""

    def rounded(module: str, weight: Tensor, scheme: LayerScheme) -> QuantizedTensor:
        groups = weight.unflatten(1, (-1, 32))
        largest = groups.abs().amax(dim=-1)
        factor = largest.amax(dim=1, keepdim=True) / 6
        scale = factor * 2.0 ** -torch.floor(torch.log2(largest.amax(dim=1, keepdim=True) / largest)).clamp(0, 14)
        codes = e2m1_codes(round_e2m1(groups / scale.unsqueeze(-1))).flatten(1)
        return QuantizedTensor(
            codes=codes.to(torch.uint8),
            scale=scale,
            scale_factor=factor,
            zero_point=None,
            input_scale=None,
            scheme=scheme,
        )

    def make(name: str, *, family: str, tied: bool, **options: Any) -> QuantizedCheckpoint:
        output: Path = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
        return quantize_blocks(make_source(family, tied=tied), output, layer_scheme(name, **options), rounded)

    return make


@pytest.fixture(scope="session")
def quantize_mixed(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
    quantize_blocks: Callable[..., QuantizedCheckpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Any], QuantizedCheckpoint]:
    """quantize_mixed(source): 8-bit linears, those of the MLPs' up-projections with zero points, the head in float."""

    def make(source: Any) -> QuantizedCheckpoint:
        output: Path = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
        return quantize_blocks(source, output, layer_scheme("W8A8"), rounded)

    def rounded(module: str, weight: Tensor, scheme: LayerScheme) -> QuantizedTensor:
        return round_nearest(weight, layer_scheme("W8A8", symmetric=False) if "up_proj" in module else scheme)

    return make


@pytest.fixture(scope="session")
def quantize_none(
    quantize_modules: Callable[..., QuantizedCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Any], QuantizedCheckpoint]:
    """quantize_none(source): a checkpoint whose linears all stayed in float."""
    return lambda source: quantize_modules(source, tmp_path_factory.mktemp("checkpoints") / "checkpoint", {})
