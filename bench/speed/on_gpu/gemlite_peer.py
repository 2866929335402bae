"""gemlite's layers as contenders. They tune themselves at the first call, so they have units of their own, late."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from on_gpu.contenders import GROUP, Bound, Contender
from on_gpu.shapes import Case
from on_gpu.timing import Calls

CASES = tuple(Case(4096, n, m) for m in (1, 16, 64) for n in (14336, 4096))


def installed() -> bool:
    """Whether gemlite can be imported."""
    return find_spec("gemlite") is not None


def _helper(*names: str) -> Any:
    """The class that one version or another calls by one of these names."""
    from gemlite import helper

    for name in names:
        if hasattr(helper, name):
            return getattr(helper, name)
    raise AttributeError(f"gemlite.helper has none of {', '.join(names)}")


def _layer(kind: str, case: Case, device: torch.device) -> Any:
    where = str(device)
    if kind == "w4a16":
        codes = torch.randint(0, 16, (case.n, case.k), dtype=torch.uint8, device=device)
        scale = torch.rand(case.n, case.k // GROUP, device=device).half() * 0.01 + 0.005
        zeros = torch.full_like(scale, 8.0)
        return _helper("A16Wn")(device=where).from_weights(codes, scale, zeros, 4, GROUP)
    weight = torch.randn(case.n, case.k, device=device).half() * 0.01
    made = _helper("A8W8_int8_dynamic") if kind == "w8a8" else _helper("A8W8_fp8_dynamic")
    return made(device=where).from_weights(weight)


def _make(kind: str, case: Case, device: torch.device, count: int) -> Bound:
    layers = [_layer(kind, case, device) for _ in range(count)]
    x = torch.randn(case.m, case.k, device=device).half()
    return Bound(Calls(lambda copy: layers[copy](x), count))


PEERS = (
    Contender(
        name="gemlite w4a16",
        weight_bits=4,
        activation_bits=16,
        rate="bf16",
        make=partial(_make, "w4a16"),
        group_bits=16,
        ours=False,
    ),
    Contender(
        name="gemlite w8a8", weight_bits=8, activation_bits=16, rate="int8", make=partial(_make, "w8a8"), ours=False
    ),
    Contender(
        name="gemlite fp8", weight_bits=8, activation_bits=16, rate="fp8", make=partial(_make, "fp8"), ours=False
    ),
)
