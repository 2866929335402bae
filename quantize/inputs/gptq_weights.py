"""Weights as GPTQ's tools store them (AutoGPTQ, GPTQModel, and those that write their format).

    qweight  I32 [K × bits / 32, N]   codes along K, the first in the lowest bits
    qzeros   I32 [G, N × bits / 32]   zero points along N; in checkpoint_format "gptq" one less than they are
    scales   F16 [G, N]
    g_idx    I32 [K]                  the group of each column

With desc_act a column's group follows the column's importance, so groups are scattered over K, in every linear in
another way. Nothing downstream stores such groups, and reordering the columns of a linear asks for another order of
its input, which q, k and v, or gate and up, would each want different: refused, unless the groups are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.artifacts.formats import INT4, INT8
from qtool.quantize.artifacts.granularity import group_size_of
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

_FORMATS = {4: INT4, 8: INT8}
_ZEROS_LESS_ONE = {"gptq": True, "gptq_v2": False}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqWeights:
    """The dialect.

    Args:
        label: how messages name the settings.
        settings: quantization_config, or the contents of quantize_config.json.

    Raises:
        InputRefused: for settings under which codes cannot be kept as they are.
    """

    def __init__(self, label: str, settings: Mapping[str, Any]) -> None:
        bits = settings.get("bits")
        if bits not in _FORMATS:
            raise InputRefused(f"{label}: bits {bits!r:.40}", "are neither 4 nor 8", REQUANTIZE)
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if layout not in _ZEROS_LESS_ONE or settings.get("is_marlin_format"):
            what = f"{label}: checkpoint_format {layout!r:.40}"
            raise InputRefused(what, "is made for one kernel", "save the model as gptq or gptq_v2")
        own = [name for name, value in (settings.get("dynamic") or {}).items() if not name.startswith("-:") and value]
        if own:
            raise InputRefused(f"{label}: dynamic: {own[0]!s:.80}", "gives some layers other settings", REQUANTIZE)
        if settings.get("adapter"):
            raise InputRefused(f"{label}: adapter", "adds to the weights what codes do not hold", REQUANTIZE)
        self._bits: int = bits
        self._layout: str = layout
        self._symmetric = bool(settings.get("sym", True))
        self._desc_act = bool(settings.get("desc_act", False))
        self._granularity = granularity_of(label, settings.get("group_size", -1))

    def parts(self, module: str, present: Set[str]) -> tuple[str, ...]:
        """See Dialect."""
        return tuple(name for name in _PARTS if f"{module}.{name}" in present) if f"{module}.qweight" in present else ()

    def weight(self, module: str, shape: tuple[int, int], arrays: Mapping[str, Array]) -> StoredWeight:
        """See Dialect."""
        (rows, columns), per_word = shape, 32 // self._bits
        groups = groups_along(self._granularity, columns)
        if columns % per_word or rows % per_word:
            raise InputRefused(f"{module} {shape}", "does not fill its words", REQUANTIZE)
        self._check_order(module, columns, arrays)
        words = part(module, arrays, "qweight", (columns // per_word, rows))
        scale = part(module, arrays, "scales", (groups, rows))
        zeros = self._zero_point(module, part(module, arrays, "qzeros", (groups, rows // per_word)))
        weight = TensorScheme(
            format=_FORMATS[self._bits], granularity=self._granularity, symmetric=self._symmetric
        )
        return StoredWeight(
            scheme=LayerScheme(weight=weight, input=None),
            codes=unpack_words(words.T, self._bits),
            scale=check_scale(module, scale.T),
            zero_point=None if self._symmetric else np.ascontiguousarray(zeros.T),
        )

    def _check_order(self, module: str, columns: int, arrays: Mapping[str, Array]) -> None:
        if "g_idx" not in arrays:
            if self._desc_act:
                raise InputRefused(f"{module}.g_idx", "is missing, but desc_act is set", "download the model again")
            return
        contiguous = np.arange(columns) // (group_size_of(self._granularity) or columns)
        if not np.array_equal(part(module, arrays, "g_idx", (columns,)), contiguous):
            why = "scatters the groups over the columns (desc_act), which no runtime of qtool's targets stores"
            remedy = "take the model without desc_act or with static_groups; qtool's act_order keeps groups together"
            raise InputRefused(f"{module}.g_idx", why, remedy)

    def _zero_point(self, module: str, words: Array) -> Codes:
        """[G, N] zero points as they are meant."""
        stored = unpack_words(words, self._bits)
        largest, middle = (1 << self._bits) - 1, 1 << (self._bits - 1)
        less_one = _ZEROS_LESS_ONE[self._layout]
        if less_one and bool((stored == largest).any()):
            why = f"holds {largest}, which readers of checkpoint_format gptq take for {largest + 1} or for 0"
            raise InputRefused(f"{module}.qzeros", why, "save the model as gptq_v2")
        zeros = stored + 1 if less_one else stored
        if self._symmetric and not bool((zeros == middle).all()):
            found = int(zeros.reshape(-1)[np.flatnonzero(zeros != middle)[0]])
            why = f"means {found} in checkpoint_format {self._layout}, but sym asks for {middle} throughout"
            other = "gptq_v2" if less_one else "gptq"
            remedy = f"if the file was written as {other}, say so in checkpoint_format; else set sym to false"
            raise InputRefused(f"{module}.qzeros", why, remedy)
        return zeros
