"""Weights as AutoAWQ stores them (version "gemm").

    qweight  I32 [K, N / 8]   codes along N; the lowest nibble of a word is column 0, then 2, 4, 6, 1, 3, 5, 7
    qzeros   I32 [G, N / 8]   zero points, interleaved likewise
    scales   F16 [G, N]
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.artifacts.formats import INT4
from qtool.quantize.artifacts.scheme import LayerScheme, TensorScheme
from qtool.quantize.inputs.packed_words import unpack_words
from qtool.quantize.inputs.stored_weight import (
    REQUANTIZE,
    Array,
    Codes,
    StoredWeight,
    check_scale,
    granularity_of,
    groups_along,
    part,
)

# In which nibble of its word each of eight columns lies.
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales")


class AwqWeights:
    """The dialect.

    Args:
        label: how messages name the settings.
        settings: quantization_config, or the contents of quant_config.json.

    Raises:
        InputRefused: for settings under which codes cannot be kept as they are.
    """

    def __init__(self, label: str, settings: Mapping[str, Any]) -> None:
        bits = settings.get("bits", settings.get("w_bit"))
        if bits != 4:
            raise InputRefused(f"{label}: bits {bits!r:.40}", "are not 4", REQUANTIZE)
        version = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
        if version != "gemm":
            why = "packs the codes in another order than gemm"
            raise InputRefused(f"{label}: version {version!r:.40}", why, "save the model as gemm")
        if not settings.get("zero_point", True):
            raise InputRefused(f"{label}: zero_point false", "leaves open what the codes mean", REQUANTIZE)
        group_size = settings.get("group_size", settings.get("q_group_size", -1))
        self._granularity = granularity_of(label, group_size)

    def parts(self, module: str, present: Set[str]) -> tuple[str, ...]:
        """See Dialect."""
        return tuple(name for name in _PARTS if f"{module}.{name}" in present) if f"{module}.qweight" in present else ()

    def weight(self, module: str, shape: tuple[int, int], arrays: Mapping[str, Array]) -> StoredWeight:
        """See Dialect."""
        rows, columns = shape
        groups = groups_along(self._granularity, columns)
        if rows % 8:
            raise InputRefused(f"{module} {shape}", "does not fill its words", REQUANTIZE)
        codes = _columns(part(module, arrays, "qweight", (columns, rows // 8)))
        zeros = _columns(part(module, arrays, "qzeros", (groups, rows // 8)))
        scale = part(module, arrays, "scales", (groups, rows))
        weight = TensorScheme(format=INT4, granularity=self._granularity, symmetric=False)
        return StoredWeight(
            scheme=LayerScheme(weight=weight, input=None),
            codes=np.ascontiguousarray(codes.T),
            scale=check_scale(module, scale.T),
            zero_point=np.ascontiguousarray(zeros.T),
        )


def _columns(words: Array) -> Codes:
    """[R, C] words to [R, 8 C] codes in the columns' own order."""
    nibbles = unpack_words(words, 4).reshape(len(words), -1, 8)
    return nibbles[:, :, _NIBBLE_OF].reshape(len(words), -1)
