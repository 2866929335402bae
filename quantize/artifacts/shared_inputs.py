"""Quantized linears that read one input, and transform and quantize it once for all of them."""

from __future__ import annotations

from torch import Tensor

from qtool.quantize.artifacts.quantized_linear import InputQuantizer, InputTransform, QuantizedLinear, input_quantizer
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor


class SharedInputs:
    """Makes the linears that read one input: those with the same transform share it, those that quantize alike too."""

    def __init__(self) -> None:
        self._quantizers: dict[object, InputQuantizer] = {}
        self._transforms: dict[str, InputTransform] = {}

    def linear(self, tensor: QuantizedTensor, bias: Tensor | None) -> QuantizedLinear:
        """One of them; bias is [N] or None."""
        quantize = self._quantizers.setdefault((tensor.site, tensor.scheme.input), input_quantizer(tensor))
        transform = None
        if tensor.transform is not None:
            transform = self._transforms.setdefault(tensor.site, InputTransform(tensor.transform.input))
        return QuantizedLinear(tensor, bias, quantize, transform)
