"""Linears in kernel layouts: the same function as the scheme's definition in torch, on the same input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.kernels.quantize_activation import RmsNorm, SiluTimes
from qtool.kernels.runtime_smooth import Requests
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme
from qtool.runtime.native.merge import Given
from qtool.runtime.native.readers import Readers

CPU = torch.device("cpu")
SUMS = 2e-6  # float sums in another order, of the output's norm
SIDE = 1e-4  # a side product in float16
TIPPED = 5e-3  # what QUAD leaves differs with the side's float16: codes tip over, and one of four bits is worth a lot
TIPPED_OF_FOUR_BITS = 3e-2
BFLOAT16 = 1e-2

KERNELS: list[tuple[str, dict[str, Any], str]] = [
    ("W4A8", {"activation": "per_token"}, "w4a8_gemm"),
    ("W4A8", {"activation": "per_token", "group_size": "channel"}, "w4a8_gemm"),
    ("W4A8", {"activation": "per_token", "group_size": "channel", "symmetric": False}, "w4a8_gemm"),
    ("W4A8", {"activation": "per_token", "group_size": 32, "symmetric": False}, "w4a8_gemm"),
    ("W4A8", {"group_size": 32}, "w4a8_gemm"),
    ("W4A8", {"activation": "per_token", "group_size": 32, "scale": "integer"}, "w4a8_gemm"),
    ("W4A8", {"activation": "per_token", "group_size": 32, "scale": "integer", "symmetric": False}, "w4a8_gemm"),
    ("W4A16", {"group_size": 32, "scale": "integer"}, "w4a16_gemm"),
    ("W4A8", {"activation": "per_tensor"}, "w4a8_gemm"),
    ("W8A8", {}, "w8a8_gemm"),
    ("W8A8", {"activation": "per_tensor"}, "w8a8_gemm"),
    ("FP8_DYNAMIC", {}, "fp8_gemm"),
    ("FP8_DYNAMIC", {"activation": "per_tensor"}, "fp8_gemm"),
    ("W4A4", {"group_size": 32}, "w4a4_gemm"),
    ("W4A4", {"group_size": "channel"}, "w4a4_gemm"),
    ("W4A4", {"group_size": 32, "activation": "per_token_group"}, "w4a4_gemm"),
    ("W4A4", {"group_size": 32, "runtime_smooth": "robust"}, "w4a4_gemm"),
    ("W4A4", {"group_size": 32, "runtime_smooth": "published"}, "w4a4_gemm"),
    ("W4A8_INT_FP", {"group_size": 32}, "w4afp8_gemm"),
    ("W4A16", {"group_size": 32}, "w4a16_gemm"),
    ("W4A16", {"group_size": 32, "symmetric": False}, "w4a16_gemm"),
]

KINDS = ("hadamard", "quad", "divide", "hadamard then divide", "low rank", "quad and low rank")


def scheme_id(value: object) -> str:
    return " ".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def inputs(rows: int = 7, columns: int = 96, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * (1 + torch.rand(columns, generator=generator) * 8)


def weights(rows: int = 40, columns: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def native(weight: QuantizedTensor, bias: Tensor | None = None) -> Readers:
    return Readers([Given(name="linear", weight=weight, bias=bias)], torch.float32)


def difference(ours: Tensor, wanted: Tensor) -> float:
    assert ours.shape == wanted.shape
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("name", "options", "op"), KERNELS, ids=scheme_id)
def test_a_scheme_runs_its_kernel_and_computes_its_definition(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor], name: str, options: dict[str, Any], op: str
) -> None:
    weight, bias = round_nearest(weights(), layer_scheme(name, **options)), torch.randn(40)
    if weight.input_scale is not None:
        weight = replace(weight, input_scale=torch.tensor(0.1))
    readers, x = native(weight, bias), inputs()
    x[3] = 0
    assert [linear.product.op for linear in readers.linears] == [op]
    (ours,) = readers(x, None, Requests.one(len(x), CPU))
    read = x.to(torch.bfloat16).to(torch.float32) if op == "w4a16_gemm" else x
    assert difference(ours, QuantizedLinear(weight, bias)(read[None])[0]) < SUMS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("W4A8", {"activation": "per_token", "group_size": 32}),
        ("W8A8", {}),
        ("W8A8", {"activation": "per_tensor"}),
        ("W4A4", {"group_size": 32}),
        ("W4A4", {"group_size": 32, "runtime_smooth": "robust"}),
        ("FP8_DYNAMIC", {}),
        ("W4A16", {"group_size": 32}),
    ],
    ids=scheme_id,
)
def test_transforms_and_side_products(
    transformed: Callable[..., QuantizedTensor], kind: str, name: str, options: dict[str, Any]
) -> None:
    weight = transformed("model.layers.0.mlp.down_proj", weights(), layer_scheme(name, **options), kind)
    if weight.input_scale is not None:
        weight = replace(weight, input_scale=torch.tensor(0.1))
    readers, x = native(weight), inputs()
    assert readers.linears[0].product.op not in ("dequantized", "float")
    (ours,) = readers(x, None, Requests.one(len(x), CPU))
    bound = _bound(name, kind)
    wanted = QuantizedLinear(weight, None)(x[None])[0]
    assert difference(ours, wanted) < bound
    without = QuantizedLinear(replace(weight, transform=None, side=None, low_rank=None), None)(x[None])[0]
    assert difference(without, wanted) > 2 * bound, "the transform does nothing"


def _bound(name: str, kind: str) -> float:
    if name == "W4A16":
        return BFLOAT16
    if "quad" in kind:
        return TIPPED_OF_FOUR_BITS if name == "W4A4" else TIPPED
    return SIDE if kind == "low rank" else SUMS


def test_what_comes_before_is_computed_with_it(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
) -> None:
    x, up, gain = inputs(), inputs(seed=5), torch.rand(96) + 0.5
    residual = inputs(seed=6)
    weight = round_nearest(weights(), layer_scheme("W8A8"))
    readers, requests = native(weight), Requests.one(len(x), CPU)
    (ours,) = readers(x, SiluTimes(up=up), requests)
    assert difference(ours, QuantizedLinear(weight, None)(torch.nn.functional.silu(x) * up)) < SUMS
    total = x + residual
    (ours,) = readers(x, RmsNorm(gain=gain, epsilon=1e-5, residual=residual), requests)
    assert torch.equal(residual, total)
    assert difference(ours, QuantizedLinear(weight, None)(torch.rms_norm(total, (96,), gain, 1e-5))) < 1e-2


def test_a_norm_in_front_of_several_inputs_runs_once(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
) -> None:
    x, residual = inputs(), inputs(seed=6)
    total = x + residual
    parts = [
        Given(name="q", weight=round_nearest(weights(), layer_scheme("W8A8")), bias=None),
        Given(name="k", weight=weights(seed=3), bias=None),
        Given(name="v", weight=round_nearest(weights(seed=4), layer_scheme("W4A4", group_size=32)), bias=None),
        Given(name="w", weight=round_nearest(weights(seed=5), layer_scheme("W8A8", symmetric=False)), bias=None),
    ]
    gain = torch.ones(96)
    ours = Readers(parts, torch.float32)(
        x, RmsNorm(gain=gain, epsilon=1e-5, residual=residual), Requests.one(len(x), CPU)
    )
    assert torch.equal(residual, total)
    normed = torch.rms_norm(total, (96,), gain, 1e-5)
    for part, found in zip(parts, ours, strict=True):
        quantized = isinstance(part.weight, QuantizedTensor)
        wanted = QuantizedLinear(part.weight, None)(normed) if quantized else normed @ part.weight.T  # type: ignore
        assert difference(found, wanted) < 2e-2, part.name


@pytest.mark.parametrize(
    ("name", "options"), [("W4A8", {"group_size": 32}), ("W8A8", {}), ("W4A4", {"group_size": 32}), ("FP8_DYNAMIC", {})]
)
@pytest.mark.parametrize("kind", ["none", "quad", "low rank"])
def test_merging_changes_no_bit(
    transformed: Callable[..., QuantizedTensor], kind: str, name: str, options: dict[str, Any]
) -> None:
    scheme, x = layer_scheme(name, **options), inputs()
    parts = [
        Given(
            name=f"model.layers.0.self_attn.{part}_proj",
            weight=transformed(f"model.layers.0.self_attn.{part}_proj", weights(rows, seed=rows), scheme, kind),
            bias=torch.randn(rows),
        )
        for part, rows in (("q", 40), ("k", 24), ("v", 8))
    ]
    merged, requests = Readers(parts, torch.float32), Requests.one(len(x), CPU)
    assert len(merged.linears) == 1
    alone = [Readers([part], torch.float32)(x, None, requests)[0] for part in parts]
    for ours, wanted in zip(merged(x, None, requests), alone, strict=True):
        if name == "FP8_DYNAMIC" or kind != "none":
            assert difference(ours, wanted) < SUMS
        else:
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("W8A8", {"symmetric": False}, "zero points"),
        ("W8A8", {"group_size": 32}, "in groups"),
        ("W4A8_INT_FP", {"group_size": 32, "symmetric": False}, "zero points"),
        ("W4A8_INT_FP", {"group_size": 32, "activation": "per_token_group"}, "in groups"),
    ],
)
def test_a_scheme_without_a_kernel_is_dequantized_and_says_why(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor], name: str, options: dict[str, Any], words: str
) -> None:
    weight = round_nearest(weights(), layer_scheme(name, **options))
    readers, x = native(weight, torch.ones(40)), inputs()
    assert readers.linears[0].product.op == "dequantized" and words in readers.linears[0].reason
    (ours,) = readers(x, None, Requests.one(len(x), CPU))
    assert difference(ours, QuantizedLinear(weight, torch.ones(40))(x)) < SUMS


@pytest.mark.parametrize(("scale", "op"), [(None, "dequantized"), ("shift", "fp8_gemm")])
def test_small_float_weights_are_fp8_where_that_is_exact(scale: str | None, op: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 96), generator=generator).to(torch.uint8)
    codes[codes == 8] = 0  # −0 is never made
    factor = torch.rand(40, 1, generator=generator) + 0.5
    steps = torch.rand(40, 3, generator=generator) * 8
    weight = QuantizedTensor(
        codes=codes,
        scale=factor * 2.0 ** -(steps if scale is None else steps.floor()),
        scale_factor=None if scale is None else factor,
        zero_point=None,
        input_scale=None,
        scheme=layer_scheme("W4A8_FP", group_size=32, scale=scale),
    )
    readers, x = native(weight), inputs()
    linear = readers.linears[0]
    assert linear.product.op == op and bool(linear.reason) == (op == "dequantized")
    (ours,) = readers(x, None, Requests.one(len(x), CPU))
    assert difference(ours, QuantizedLinear(weight, None)(x)) < SUMS
    assert torch.equal(linear.product.rows(torch.tensor([1, 2])), weight.dequantize()[1:3])


def test_group_scales_that_are_small_integers_stay_integers(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
) -> None:
    weight = round_nearest(weights(columns=128), layer_scheme("W4A8", activation="per_token", group_size=32))
    exponents = torch.tensor([0.0, 1.0, 3.0, 4.0])
    weight = replace(weight, scale=torch.full((40, 4), 0.003) * 2**exponents)
    readers, x = native(weight), inputs(columns=128)
    held: Any = readers.linears[0].product
    assert held.weight.integers.tolist()[0] == [1, 2, 8, 16]
    (ours,) = readers(x, None, Requests.one(len(x), CPU))
    assert difference(ours, QuantizedLinear(weight, None)(x)) < SUMS


@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_scales_stay_integers_whatever_the_smallest_is(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor], symmetric: bool
) -> None:
    scheme = layer_scheme("W4A8", activation="per_token", group_size=32, scale="integer", symmetric=symmetric)
    parts = [Given(name=f"l{i}", weight=round_nearest(weights(seed=i), scheme), bias=None) for i in range(2)]
    readers, x = Readers(parts, torch.float32), inputs()
    held: Any = readers.linears[0].product
    assert len(readers.linears) == 1 and int(held.weight.integers.amin(dim=1).max()) > 1
    found = torch.cat(list(readers(x, None, Requests.one(len(x), CPU))), dim=1)
    wanted = torch.cat([QuantizedLinear(part.weight, None)(x) for part in parts], dim=1)
    assert difference(found, wanted) < SUMS


def test_integer_scales_beyond_int8_are_multiplied_as_floats(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
) -> None:
    """As GPTQ can leave them: a code that no weight had when the zero point was chosen."""
    scheme = layer_scheme("W4A8", activation="per_token", group_size=32, scale="integer", symmetric=False)
    weight = round_nearest(weights(), scheme)
    assert weight.zero_point is not None and weight.scale_factor is not None
    weight.zero_point[:, 0], weight.codes[:, 0] = 2, 15
    weight.scale[:, 0] = weight.scale_factor[:, 0] * 16
    readers, x = native(weight), inputs()
    held: Any = readers.linears[0].product
    assert held.weight.integers is None
    (ours,) = readers(x, None, Requests.one(len(x), CPU))
    assert difference(ours, QuantizedLinear(weight, None)(x)) < SUMS


def test_the_rows_of_a_tied_head_are_its_dequantized_ones(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
) -> None:
    ids = torch.tensor([3, 3, 39, 0])
    for name, options, _ in KERNELS:
        weight = round_nearest(weights(), layer_scheme(name, **options))
        product = native(weight).linears[0].product
        assert torch.equal(product.rows(ids), weight.dequantize()[ids]), name


def test_a_request_has_factors_of_its_own(
    round_nearest: Callable[[Tensor, LayerScheme], QuantizedTensor],
) -> None:
    weight = round_nearest(weights(), layer_scheme("W4A4", group_size=32, runtime_smooth="robust"))
    readers, one, two = native(weight), inputs(5), inputs(3, seed=9) * 10
    (together,) = readers(torch.cat((one, two)), None, Requests.of_lengths([5, 3], CPU))
    alone = [readers(x, None, Requests.one(len(x), CPU))[0] for x in (one, two)]
    assert torch.equal(together, torch.cat(alone))
