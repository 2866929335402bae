"""The quantized linear computes its scheme: against integer arithmetic done by hand in float64."""

from __future__ import annotations

from weakref import ref

import pytest
import torch

from qtool.kernels.dequantize_weight import widen_to_e4m3
from qtool.quantize.artifacts.quantized_linear import InputQuantizer, QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.quantizers.numerics import choose_grid, encode


def make(name: str, **options: object) -> QuantizedTensor:
    scheme = layer_scheme(name, **options)  # type: ignore[arg-type]
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    grid = choose_grid(weight, scheme.weight, mse_clip=False)
    static = scheme.input is not None and not scheme.input.dynamic
    return QuantizedTensor(
        codes=encode(weight, grid, scheme.weight),
        scale=grid.scale,
        scale_factor=grid.factor,
        zero_point=grid.zero_point,
        input_scale=torch.tensor(0.02) if static else None,
        scheme=scheme,
    )


def integer_gemm(x: torch.Tensor, tensor: QuantizedTensor, blocks: list[range], static: float | None) -> torch.Tensor:
    """Σ over blocks of sx × sw × Σ_k qx qw with exact integer sums."""
    codes = tensor.codes.double() - 2.0 ** (tensor.scheme.weight.format.bits - 1)
    out = torch.zeros(x.shape[0], len(codes), dtype=torch.float64)
    for number, block in enumerate(blocks):
        part = x[:, block.start : block.stop].double()
        scale = part.abs().amax(1, keepdim=True) / 127 if static is None else torch.full((len(x), 1), static)
        qx = (part / scale).round().clamp(-127, 127)
        sw = tensor.scale[:, min(number, tensor.scale.shape[1] - 1)].double()
        out += scale * sw * (qx @ codes[:, block.start : block.stop].T)
    return out


GROUPS = [range(0, 32), range(32, 64), range(64, 70)]


@pytest.mark.parametrize(
    ("options", "blocks", "static"),
    [
        ({"name": "W8A8"}, [range(70)], None),
        ({"name": "W8A8", "activation": "per_tensor"}, [range(70)], 0.02),
        ({"name": "W4A8", "group_size": 32}, GROUPS, None),
        ({"name": "W4A8", "group_size": "channel", "activation": "per_token"}, [range(70)], None),
    ],
)
def test_integer_schemes_equal_an_integer_gemm(options: dict, blocks: list[range], static: float | None) -> None:  # type: ignore[type-arg]
    x = torch.randn(9, 70, generator=torch.Generator().manual_seed(2))
    tensor = make(**options)
    bias = torch.arange(5.0)
    ours = QuantizedLinear(tensor, bias)(x)
    torch.testing.assert_close(ours.double(), integer_gemm(x, tensor, blocks, static) + bias, rtol=1e-5, atol=1e-5)


def test_weight_only_leaves_the_input_alone() -> None:
    tensor, x = make("W4A16", group_size=32, symmetric=False), torch.randn(3, 70)
    assert torch.equal(QuantizedLinear(tensor, None)(x), x @ tensor.dequantize().T)


def test_fp8_rounds_the_input_to_eight_bits() -> None:
    linear = QuantizedLinear(make("FP8_DYNAMIC"), None)
    x = torch.zeros(1, 70)
    x[0, :3] = torch.tensor([448.0, 17.0, 300.0])
    assert linear.quantize(x)[0, :3].tolist() == [448.0, 16.0, 288.0]


BLOCKS = torch.tensor([[7.5, 3.2, -1.1, 0.3] + [0.0] * 28 + [448.0, 17.0, 300.0, 1.0] + [0.0] * 34])


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"name": "W4A8_FP"}, [7.5, 3.25, -1.125, 0.3125], [448.0, 16.0, 288.0, 1.0]),
        ({"name": "W4A8_FP", "activation": "per_token_group", "group_size": 32}, None, [448.0, 16.0, 288.0, 1.0]),
        ({"name": "MXFP4A8"}, [7.5, 3.25, -1.125, 0.3125], [448.0, 16.0, 288.0, 1.0]),
        ({"name": "MXFP4"}, [8.0, 3.0, -1.0, 0.0], [512.0, 0.0, 256.0, 0.0]),
        ({"name": "NVFP4"}, [7.5, 3.75, -1.25, 0.0], [448.0, 0.0, 298.6667, 0.0]),
    ],
)
def test_float_activations_by_hand(
    options: dict[str, object], first: list[float] | None, second: list[float]
) -> None:
    quantize = QuantizedLinear(make(**options), None).quantize  # type: ignore[arg-type]
    found = quantize(BLOCKS)[0]
    if first is not None:
        torch.testing.assert_close(found[:4], torch.tensor(first))
    torch.testing.assert_close(found[32:36], torch.tensor(second))


def test_shifted_fp4_weights_compute_what_fp8_weights_compute() -> None:
    tensor, x = make("W4A8_FP", scale="shift"), torch.randn(7, 70, generator=torch.Generator().manual_seed(3))
    codes, scale = widen_to_e4m3(tensor.codes, tensor.scale, group_size=64, zero_code=0, e2m1=True)
    fp8 = QuantizedTensor(
        codes=codes, scale=scale, zero_point=None, input_scale=None, scheme=layer_scheme("FP8_DYNAMIC")
    )
    assert torch.equal(QuantizedLinear(tensor, None)(x), QuantizedLinear(fp8, None)(x))


def test_shared_inputs_are_quantized_once_and_never_stale() -> None:
    scheme = layer_scheme("W8A8").input
    quantizer = InputQuantizer(scheme, None)
    first, second = torch.randn(2, 8), torch.randn(2, 8)
    once = quantizer(first)
    assert quantizer(first) is once
    assert torch.equal(quantizer(second), InputQuantizer(scheme, None)(second))
    assert not torch.equal(quantizer(second), once)


def test_a_remembered_result_goes_with_its_input() -> None:
    quantizer = InputQuantizer(layer_scheme("W8A8").input, None)
    x = torch.randn(2, 8)
    result = ref(quantizer(x))
    assert result() is not None
    del x
    assert result() is None
