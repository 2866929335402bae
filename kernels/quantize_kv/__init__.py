"""Keys and values to the codes of a low-bit cache and back: one scale per token and head, found from that token alone.
A head may be cut into groups with a scale each: they are heads of their own here.

    symmetric    s = f16(max|x| / m)                      code = rhe(x / s) + z     x̂ = s (code − z)
    asymmetric   o = f16(min x), s = f16((max x − o) / n)  code = rhe((x − o) / s)   x̂ = s code + o
    FP8 E4M3     s = f16(max|x| / 448)                    code = cast(x / s)        x̂ = s code

with rhe round-half-even and, for 4 | 8 bits, m = 7 | 127, z = 8 | 128, n = 15 | 255. Codes are found with the scale and
offset as they are stored, so rounding those to float16 costs range, never accuracy; codes saturate. A scale that rounds
to zero is stored as zero, with the code of zero (the offset, where there is one). What is not finite, and what
overflows a float16 scale, comes back as NaN. Nothing depends on other tokens, other heads or the batch: prefill and
decode, whole or in pieces, store the same bits.

`KVCache` is the memory a runtime decodes with, `write_kv` quantizes into it on a GPU (or anywhere, by the reference),
`read_cache` says what it stands for; kernels/kv_attention reads it.
"""

from __future__ import annotations

from qtool.kernels.quantize_kv.cache import KVCache, KVFormat, StoredHeads, empty_cache
from qtool.kernels.quantize_kv.cache_reference import read_cache
from qtool.kernels.quantize_kv.reference import KVCodes, dequantize_kv, quantize_kv_fp8, quantize_kv_int
from qtool.kernels.quantize_kv.write import write_kv

__all__ = [
    "KVCache",
    "KVCodes",
    "KVFormat",
    "StoredHeads",
    "dequantize_kv",
    "empty_cache",
    "quantize_kv_fp8",
    "quantize_kv_int",
    "read_cache",
    "write_kv",
]
