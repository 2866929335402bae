"""Deliberate faults in the kernels, each with the test that must notice (test_mutations.py makes and runs them)."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault.

    Attributes:
        name: what is wrong.
        file: below the repository's root, in kernels/.
        text: what stands there, exactly once.
        replacement: what is put in its place.
        test: below tests/kernels/interpreted, as "test_x.py::test_y[z]"; a quick one.
    """

    name: str
    file: str
    text: str
    replacement: str
    test: str


MUTATIONS = [
    Mutation(
        "wrong nibble order in the ×16 unpacking",
        "kernels/language/unpack.py",
        "        low = packed << 4\n        high = packed & -16\n",
        "        high = packed << 4\n        low = packed & -16\n",
        "test_language_interpreted.py::test_both_nibbles_of_every_byte[x16]",
    ),
    Mutation(
        "E4M3 rounded half up instead of to even",
        "kernels/language/casts.py",
        "(magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20",
        "(magnitude + 0x80000) >> 20",
        "test_language_interpreted.py::test_to_e4m3_rounds_as_torch_does_and_saturates",
    ),
    Mutation(
        "W4A8: wrong nibble order",
        "kernels/w4a8_gemm/triton_kernel.py",
        "low, high = unpack_x16(packed, ASM)",
        "high, low = unpack_x16(packed, ASM)",
        "test_w4a8_gemm_interpreted.py::test_an_integer_sum_is_exact[channel]",
    ),
    Mutation(
        "W4A8: the first tile's group scales used for every tile",
        "kernels/w4a8_gemm/triton_kernel.py",
        "s_low, s_high = load_pair(w_groups, row, w_groups_stride_n, w_groups_stride_g, tile + 1, K, W_GROUP)",
        "s_low, s_high = load_pair(w_groups, row, w_groups_stride_n, w_groups_stride_g, first, K, W_GROUP)",
        "test_w4a8_gemm_interpreted.py::test_an_integer_sum_is_exact[integers of 64]",
    ),
    Mutation(
        "W8A8: a column too many in the mask of a ragged K",
        "kernels/w8a8_gemm/triton_kernel.py",
        "left = column < K - tile * 128",
        "left = column <= K - tile * 128",
        "test_w8a8_gemm_interpreted.py::test_an_integer_sum_is_exact[(1, 70, 257)-whole]",
    ),
    Mutation(
        "integer products: a token too many in the mask of the output",
        "kernels/integer_gemm/triton_epilogue.py",
        "in_m = rm < M",
        "in_m = rm <= M",
        "test_w8a8_gemm_interpreted.py::test_an_integer_sum_is_exact[(3, 64, 384)-whole]",
    ),
    Mutation(
        "integer products: the tokens' scale dropped",
        "kernels/integer_gemm/triton_epilogue.py",
        "value = value * tl.load(x_scale + rm * x_scale_stride, mask=in_m, other=0.0)[None, :]",
        "value = value * 1.0",
        "test_w8a8_gemm_interpreted.py::test_scales_and_bias_round_once_each[per token-dtype0]",
    ),
    Mutation(
        "integer products: shared sums not left zero",
        "kernels/integer_gemm/triton_epilogue.py",
        "tl.store(mine, tl.zeros((BLOCK_N, BLOCK_M), tl.int32))",
        "tl.store(mine, acc)",
        "test_w4a8_gemm_interpreted.py::test_shared_sums_are_left_as_they_were_found[channel]",
    ),
    Mutation(
        "W4A4: the activations' factor of 16 not shifted out",
        "kernels/w4a8_gemm/triton_kernel.py",
        "(4 if X_INT4 else 0)",
        "0",
        "test_w4a4_gemm_interpreted.py::test_an_integer_sum_is_exact[(1, 5, 40)-whole]",
    ),
    Mutation(
        "halves of a quantized row in the wrong nibbles",
        "kernels/quantize_activation/triton_kernel.py",
        "packed = (low & 15) | (high << 4)",
        "packed = (high & 15) | (low << 4)",
        "test_quantize_rows_interpreted.py::test_plain_rows[dtype0-shape0-None-int4_halves]",
    ),
    Mutation(
        "the last row of a request left out of its ranges",
        "kernels/runtime_smooth/triton_kernel.py",
        "inside = rows < last\n",
        "inside = rows < last - 1\n",
        "test_smooth_rows_interpreted.py::test_ragged_requests[triton-dtype0-int4-64-rule0]",
    ),
    Mutation(
        "a rotation's 1 / √block dropped",
        "kernels/side_gemm/triton_kernel.py",
        "values = dot_split_left(values, matrix, zeros, 3) * shrink",
        "values = dot_split_left(values, matrix, zeros, 3)",
        "test_side_gemm_interpreted.py::test_quad_input[slices-int4-320-8-None-64]",
    ),
    Mutation(
        "block scale of FP8 weights dropped",
        "kernels/fp8_gemm/triton_kernel.py",
        "                    factor *= tl.load(pws + t * w_scale_block)\n",
        "                    factor *= 1.0\n",
        "test_fp8_gemm_interpreted.py::test_every_pair_of_scales[block-block]",
    ),
    Mutation(
        "one column too many of the FP8 activations",
        "kernels/w4afp8_gemm/triton_kernel.py",
        "(rh < left)[None, :]",
        "(rh <= left)[None, :]",
        "test_w4afp8_gemm_interpreted.py::test_scales_of_rows_at_ragged_shapes[3-130-257-out1]",
    ),
    Mutation(
        "low nibbles' zero points on the high nibbles",
        "kernels/w4a16_gemm/triton_kernel.py",
        "zeros[at // WIDTH], zeros[(HALF + at) // WIDTH]",
        "zeros[at // WIDTH], zeros[at // WIDTH]",
        "test_w4a16_gemm_interpreted.py::test_every_code_and_zero_point_in_every_place[kind0]",
    ),
    Mutation(
        "the last part of a cut K left out",
        "kernels/language/ordered_sum.py",
        "tl.where(last, PARTS, 0)",
        "tl.where(last, PARTS - 1, 0)",
        "test_w4a16_gemm_interpreted.py::test_both_operand_orders[None-True]",
    ),
    Mutation(
        "the two nibbles of a cache's byte given each other's channels",
        "kernels/kv_attention/codes.py",
        "channel = 2 * word + code // 2 + code % 2 * (C // 2)",
        "channel = 2 * word + code // 2 + (1 - code % 2) * (C // 2)",
        "test_kv_attention_interpreted.py::test_every_cut_of_a_sequence[0-1-15]",
    ),
    Mutation(
        "scale of a cache's values dropped",
        "kernels/kv_attention/triton_kernel.py",
        "as_type(p * step[None, :], wide_dtype)",
        "as_type(p, wide_dtype)",
        "test_kv_attention_interpreted.py::test_every_cut_of_a_sequence[0-1-15]",
    ),
    Mutation(
        "one token too many of a cache",
        "kernels/kv_attention/triton_kernel.py",
        "inside = t < hi",
        "inside = t <= hi",
        "test_kv_attention_interpreted.py::test_every_cut_of_a_sequence[0-1-15]",
    ),
    Mutation(
        "the latest exact token left out",
        "kernels/kv_attention/triton_kernel.py",
        "inside = e < exact",
        "inside = e < exact - 1",
        "test_kv_attention_interpreted.py::test_exact_tokens_and_windows[0-1-1]",
    ),
    Mutation(
        "a written byte's nibbles swapped",
        "kernels/quantize_kv/triton_kernel.py",
        "(low & 15) | (high << 4)",
        "(high & 15) | (low << 4)",
        "test_quantize_kv_interpreted.py::test_what_is_stored_is_what_the_formulas_say[int8-int4 asym-64]",
    ),
]
