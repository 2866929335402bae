"""A linear's codes, scales and zero points under the names and in the packing of compressed-tensors.

    pack-quantized    weight_packed I32 [N, ceil(K × bits / 32)]: the codes, the first in a word's lowest bits
                      weight_shape I64 [2], weight_zero_point I32 [ceil(N × bits / 32), G], packed along N
    int-quantized     weight I8 [N, K], weight_zero_point I8 [N, G]: codes less 128
    float-quantized   weight F8_E4M3 [N, K]
    all               weight_scale [N, G], F16 where it holds every scale, else F32; input_scale F32 [1] if static
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.kernels.pack import pack_int4
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.stored_scale import STORED_SCALES
from qtool.quantize.export.hf.compressed_scheme import FLOAT, PACKED, layout_of

WORD_BYTES = 4


def compressed_tensors(module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of one linear."""
    layout, fmt = layout_of(weight.scheme), weight.scheme.weight.format
    parts: dict[str, Tensor] = {"weight_scale": STORED_SCALES["float"].write(weight.scale, None)["scale"]}
    zeros = weight.zero_point
    if layout == PACKED:
        parts["weight_packed"] = _words(weight.codes, fmt.bits)
        parts["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        if zeros is not None:
            parts["weight_zero_point"] = _words(zeros.T.contiguous(), fmt.bits).T.contiguous()
    else:
        parts["weight"] = weight.codes if layout == FLOAT else _signed(weight.codes)
        if zeros is not None:
            parts["weight_zero_point"] = _signed(zeros)
    if weight.input_scale is not None:
        parts["input_scale"] = weight.input_scale.reshape(1)
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}


def _words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] codes to [R, ceil(C × bits / 32)] words; what is missing in the last word is zero."""
    per_word = 8 * WORD_BYTES // bits
    codes = pad(codes, (0, -codes.shape[1] % per_word))
    octets = pack_int4(codes) if bits == 4 else codes
    return octets.reshape(-1).view(torch.int32).reshape(len(codes), -1)


def _signed(codes: Tensor) -> Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8)
