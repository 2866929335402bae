"""Traps that single linears are in: slow kernels, and precision that the file does not mention.

Factors are measured at one token on two cores (see `costs`).
"""

from __future__ import annotations

from qtool.runtime.explain.facts import Facts, warn
from qtool.runtime.explain.graph import input_at
from qtool.runtime.explain.kernels import FLOAT_PRODUCTS, rounded_input
from qtool.runtime.explain.linears import find_linears, linear_name
from qtool.runtime.explain.report import LinearReport, Trap

HALF = ("float16", "bfloat16")


def weights_dequantized(facts: Facts) -> Trap | None:
    """A DequantizeLinear between a stored weight and its product."""
    where = facts.where(lambda linear: linear.kernel.startswith("DequantizeLinear"))
    if not where:
        return None
    return Trap(
        code="weights-dequantized",
        warning=True,
        what="weights are dequantized to float32 at every call, about 50 times a fused kernel's time at one token",
        remedy=f"{_how_to_fuse(facts, where)}; session.disable_quant_qdq=1 unpacks them once, to float32 size",
        where=where,
    )


def _how_to_fuse(facts: Facts, where: tuple[str, ...]) -> str:
    found = [linear for linear in facts.linears if linear.name in where]
    if any(linear.stored.startswith("fp8") for linear in found):
        return "the CPU has no FP8 product: quantize weights to int4 or int8"
    if facts.level in ("basic", "none"):
        return "load it at the default optimization level, which fuses from extended on"
    if any("rounded to" in linear.activations for linear in found):
        return "take the Q-DQ off the activations, or quantize them to 8 bits and the weights to int8 per channel"
    return "store the matrix as [in, out], dequantized along the first axis, with nothing between it and the product"


def weights_converted(facts: Facts) -> Trap | None:
    """Any other work on a stored weight at every call."""
    where = facts.where(lambda linear: "of the weight at every call" in linear.kernel)
    return warn(
        "weights-converted",
        "weights are transformed again at every call",
        "store them in the form in which they are multiplied",
        where,
    )


def eight_bits_without_level_4(facts: Facts) -> Trap | None:
    """MatMulNBits of 8 bits with float activations."""
    where = facts.where(lambda linear: "unpacked" in linear.kernel and _eight_bits_in_float(linear))
    return warn(
        "8-bit-without-level-4",
        "8-bit MatMulNBits without accuracy_level 4 takes 70 to 280 times as long at one token",
        "set accuracy_level=4 (INT8 activations), or use 4 bits",
        where,
    )


def unpacked(facts: Facts) -> Trap | None:
    """MatMulNBits that has no packed form: g_idx, or zero points that are no codes."""
    where = facts.where(lambda linear: "unpacked" in linear.kernel and not _eight_bits_in_float(linear))
    return warn(
        "g-idx-or-float-zero-points",
        "MatMulNBits with g_idx or float zero points unpacks the whole weight at every call",
        "quantize without act-order (or reorder the rows into the layer before) and with integer zero points",
        where,
    )


def _eight_bits_in_float(linear: LinearReport) -> bool:
    return "8 bits" in linear.kernel and "level 4" not in linear.kernel


def signed_integers(facts: Facts) -> Trap | None:
    """MatMulInteger of int8 by int8."""
    where = facts.where(lambda linear: "int8 × int8" in linear.kernel)
    return warn(
        "int8-by-int8",
        "MatMulInteger of int8 activations is not optimised: 9 to 63 times as slow as uint8",
        "quantize activations to uint8 with zero point 128: the same numbers",
        where,
    )


def wide_activations(facts: Facts) -> Trap | None:
    """Activations quantized to 16 bits."""
    wide = ("uint16", "int16")
    where = facts.where(lambda linear: any(f"rounded to {name}" in linear.activations for name in wide))
    return warn(
        "16-bit-activations",
        "16-bit activations have no kernel on the CPU: rounded, then multiplied in float32",
        "use this file on an NPU only, and here 8-bit activations",
        where,
    )


def rounded_twice(facts: Facts) -> Trap | None:
    """Q-DQ in front of a kernel that quantizes its input itself."""
    where = tuple(
        facts.name(node)
        for node in facts.view.nodes
        if node.op_type == "MatMulNBits" and rounded_input(facts.view, input_at(node, 0))
    )
    return warn(
        "rounded-twice",
        "activations go through Q-DQ and then into MatMulNBits: both run, and at level 4 both round",
        "take the Q-DQ off the activations of MatMulNBits",
        where,
    )


def half_floats(facts: Facts) -> Trap | None:
    """Weights, or scales, in FP16 and BF16. One that the file itself casts is stored in 16 bits only: the runtime folds
    the cast when it loads."""
    where = tuple(
        linear_name(linear)
        for linear in find_linears(facts.source)
        if any(part.dtype in HALF and part.elements > 1 for part in linear.parts)
        and not any(node.op_type == "Cast" for node in linear.between)
    )
    return warn(
        "half-floats",
        "16-bit floats are computed as float32, converted before and after: never faster than float32",
        "export float32 (weights in 4 or 8 bits, their scales in float32)",
        where,
    )


def silently_rounded(facts: Facts) -> Trap | None:
    """Weight-only Q-DQ that the runtime turns into integer arithmetic."""
    where = facts.where(
        lambda linear: linear.source in FLOAT_PRODUCTS and linear.kernel.startswith("MatMulNBits level 4"),
    )
    if not where:
        return None
    return Trap(
        code="activations-rounded",
        warning=False,
        what="the file quantizes weights only, the fusion rounds activations to int8 as well",
        remedy="if that is not meant, load it with session.qdq_matmulnbits_accuracy_level=0 (slower)",
        where=where,
    )


def one_scale_for_all(facts: Facts) -> Trap | None:
    """Dynamic quantization per tensor: a token's result depends on its neighbours."""
    where = facts.where(lambda linear: "one scale for all tokens" in linear.activations)
    if not where:
        return None
    return Trap(
        code="one-scale-for-all-tokens",
        warning=False,
        what="activations of a call share one scale: results depend on later tokens and on how a prompt is cut",
        remedy="score it with the cut that it is served with; or divide rows by their maxima before a fixed scale",
        where=where,
    )


def unknown_kernels(facts: Facts) -> Trap | None:
    """Linears that the recognition table or the trace does not know."""
    where = facts.where(lambda linear: linear.compute == "unknown")
    if not where:
        return None
    return Trap(
        code="not-recognised",
        warning=False,
        what="these linears ended in nodes that explain does not know",
        remedy="--profile measures them",
        where=where,
    )
