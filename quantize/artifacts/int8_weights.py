"""A checkpoint's own weights on an 8-bit grid: what a prompt is read with where a package has a graph for it.

Every quantized linear but the head, or those of some names, takes the scheme W8A8 per channel and token; its codes are
the nearest ones to what the checkpoint's codes stand for, behind the same transform and beside the same side products.
A 4-bit weight moves by at most half of 1/127 of its row's largest; what the 4 bits lost is not restored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.recipe import HEAD
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme

SMALLEST_SCALE = 2.0**-100


class Int8Weights(QuantizedCheckpoint):
    """A view of an opened checkpoint.

    Args:
        checkpoint: whose weights these are.
        leaves: what the linears that are INT8 are called in their layers, "down_proj"; the others stay as they are
            stored. None for all.
    """

    def __init__(self, checkpoint: QuantizedCheckpoint, leaves: Collection[str] | None = None) -> None:
        self.__dict__.update(checkpoint.__dict__)
        scheme = layer_scheme("W8A8")
        self.schemes: dict[str, LayerScheme] = {
            module: stored if module == HEAD or not _named(module, leaves) else scheme
            for module, stored in checkpoint.schemes.items()
        }
        self._stored = checkpoint

    def quantized(self, module: str) -> QuantizedTensor:
        """See QuantizedCheckpoint."""
        stored = self._stored.quantized(module)
        scheme = self.schemes[module]
        if stored.scheme == scheme:
            return stored
        weight = stored.dequantize()
        scale = (weight.abs().amax(dim=1, keepdim=True) / scheme.weight.format.qmax).clamp_min(SMALLEST_SCALE)
        codes = torch.round(weight / scale) + scheme.weight.format.zero_code
        return replace(
            stored,
            codes=codes.to(torch.uint8),
            scale=scale,
            scale_factor=None,
            zero_point=None,
            input_scale=None,
            scheme=scheme,
        )


def _named(module: str, leaves: Collection[str] | None) -> bool:
    return leaves is None or module.rpartition(".")[2] in leaves
