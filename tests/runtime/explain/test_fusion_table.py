"""Every way in which a linear is written down, loaded into the runtime, and what explain says of it.

The expectations hold for onnxruntime 1.28 to 1.31; that the operators are really these is checked against a session on
the file itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qtool.errors import InputRefused
from qtool.runtime.explain import LEVELS, Settings, explain

BLOCKS = "int8 by token and block"
UNFUSED = "DequantizeLinear at every call + MatMul float32"
FIXED = "per tensor, fixed scale"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A graph, how it is loaded, and what must be said."""

    graph: Callable[[Any], Any]
    kernel: str
    compute: str
    activations: str
    operators: tuple[str, ...]
    traps: tuple[str, ...] = ()
    level: str = "all"
    config: Mapping[str, str] = field(default_factory=dict)


def fused(graph: Callable[[Any], Any], bits: int, block: int = 32, **options: Any) -> Case:
    """Q-DQ of the weight alone becomes MatMulNBits level 4."""
    values = {
        "kernel": f"MatMulNBits level 4, {bits} bits, block {block}",
        "compute": "integer",
        "activations": BLOCKS,
        "traps": ("activations-rounded",),
        **options,
    }
    return Case(graph=graph, operators=("MatMulNBits",), **values)


def unfused(graph: Callable[[Any], Any], activations: str, *traps: str, **options: Any) -> Case:
    """The weight is dequantized at every call."""
    return Case(
        graph=graph,
        kernel=UNFUSED,
        compute="float",
        activations=activations,
        operators=("DequantizeLinear", "MatMul"),
        traps=("weights-dequantized", *traps),
        **options,
    )


def integer(graph: Callable[[Any], Any], kernel: str, activations: str, *traps: str) -> Case:
    """Integer arithmetic in one node."""
    return Case(
        graph=graph,
        kernel=kernel,
        compute="integer",
        activations=activations,
        operators=(kernel.split()[0],),
        traps=traps,
    )


CASES: dict[str, Case] = {
    # weights alone
    "int4 block 32": fused(lambda g: g.weight_only("INT4", block=32), 4),
    "int4 block 16": fused(lambda g: g.weight_only("INT4", block=16), 4, 16),
    "int4 block 128": fused(lambda g: g.weight_only("INT4", block=128), 4, 128),
    "int4 asymmetric": fused(lambda g: g.weight_only("INT4", block=32, symmetric=False), 4),
    "uint4": fused(lambda g: g.weight_only("UINT4", block=32), 4),
    "int4 gemm": fused(lambda g: g.weight_only_gemm("INT4", block=32), 4),
    "uint4 gemm": fused(lambda g: g.weight_only_gemm("UINT4", block=32), 4),
    "int4 level extended": fused(lambda g: g.weight_only("INT4", block=32), 4, level="extended"),
    "int4 level basic": unfused(lambda g: g.weight_only("INT4", block=32), "float32", level="basic"),
    "int4 level none": unfused(lambda g: g.weight_only("INT4", block=32), "float32", level="none"),
    "int4 per channel": fused(lambda g: g.weight_only("INT4", channels=True), 4),
    "int8 block": fused(lambda g: g.weight_only("INT8", block=32), 8),
    "uint8 block": fused(lambda g: g.weight_only("UINT8", block=32), 8),
    "int8 per channel": fused(lambda g: g.weight_only("INT8", channels=True), 8),
    "int4 asked for floats": fused(
        lambda g: g.weight_only("INT4", block=32),
        4,
        kernel="MatMulNBits level 0, 4 bits, block 32",
        compute="float",
        activations="float32",
        traps=(),
        config={"session.qdq_matmulnbits_accuracy_level": "0"},
    ),
    # weights and activations
    "u8 × s8, rounded output": integer(
        lambda g: g.static("UINT8", "INT8", rounded_output=True, channels=True), "QLinearMatMul", f"uint8 {FIXED}"
    ),
    "s8 × s8, rounded output": integer(
        lambda g: g.static("INT8", "INT8", rounded_output=True, channels=True), "QLinearMatMul", FIXED
    ),
    "u8 × s8": integer(
        lambda g: g.static("UINT8", "INT8", channels=True), "MatMulIntegerToFloat", f"uint8 {FIXED}"
    ),
    "s8 × s8": integer(lambda g: g.static("INT8", "INT8", channels=True), "MatMulIntegerToFloat", FIXED),
    "u8 × u8": integer(lambda g: g.static("UINT8", "UINT8"), "MatMulIntegerToFloat", f"uint8 {FIXED}"),
    "rows divided by their maxima": integer(
        lambda g: g.row_normalised(), "MatMulIntegerToFloat", "uint8 per token (rows divided by their maxima)"
    ),
    "dynamic": integer(
        lambda g: g.dynamic(),
        "DynamicQuantizeMatMul",
        "uint8 per tensor, one scale for all tokens of a call",
        "one-scale-for-all-tokens",
    ),
    "u8 × int4": unfused(lambda g: g.static("UINT8", "INT4", block=32), "rounded to uint8"),
    "u8 × int4, rounded output": unfused(
        lambda g: g.static("UINT8", "INT4", rounded_output=True, block=32), "rounded to uint8"
    ),
    "s8 × int4 per channel": unfused(lambda g: g.static("INT8", "INT4", channels=True), "int8 per tensor"),
    "u16 × int4": unfused(
        lambda g: g.static("UINT16", "INT4", block=32), "float32, rounded to uint16", "16-bit-activations"
    ),
    "u16 × s8": unfused(
        lambda g: g.static("UINT16", "INT8", channels=True), "float32, rounded to uint16", "16-bit-activations"
    ),
    "s16 × s8": unfused(
        lambda g: g.static("INT16", "INT8", channels=True), "float32, rounded to int16", "16-bit-activations"
    ),
    "u16 × s8, weights unpacked once": Case(
        graph=lambda g: g.static("UINT16", "INT8", channels=True),
        kernel="MatMul float32",
        compute="float",
        activations="float32, rounded to uint16",
        operators=("QuantizeLinear", "DequantizeLinear", "MatMul"),
        traps=("16-bit-activations",),
        config={"session.disable_quant_qdq": "1"},
    ),
    "Q-DQ before MatMulNBits": Case(
        graph=lambda g: g.nbits(4, 4, activation="UINT8"),
        kernel="MatMulNBits level 4, 4 bits, block 32",
        compute="integer",
        activations=f"{BLOCKS}, rounded to uint8 {FIXED} before",
        operators=("QuantizeLinear", "DequantizeLinear", "MatMulNBits"),
        traps=("rounded-twice",),
    ),
    # MatMulNBits itself
    "4 bits level 4": fused(lambda g: g.nbits(4, 4), 4, traps=()),
    "4 bits level 4 block 128": fused(lambda g: g.nbits(4, 4, block=128), 4, 128, traps=()),
    "8 bits level 4": fused(lambda g: g.nbits(8, 4), 8, traps=()),
    "4 bits level 1": fused(
        lambda g: g.nbits(4, 1),
        4,
        kernel="MatMulNBits level 1, 4 bits, block 32",
        compute="float",
        activations="float32",
        traps=(),
    ),
    "4 bits, level not said": fused(
        lambda g: g.nbits(4, None),
        4,
        kernel="MatMulNBits level 0, 4 bits, block 32",
        compute="float",
        activations="float32",
        traps=(),
    ),
    "4 bits level 4 forced to floats": fused(
        lambda g: g.nbits(4, 4),
        4,
        kernel="MatMulNBits level 1, 4 bits, block 32",
        compute="float",
        activations="float32",
        traps=(),
        config={"mlas.qnbit.force_fp32": "1"},
    ),
    "8 bits, level not said": fused(
        lambda g: g.nbits(8, None),
        8,
        kernel="MatMulNBits level 0, 8 bits, block 32: unpacked at every call",
        compute="float",
        activations="float32",
        traps=("8-bit-without-level-4",),
    ),
    "8 bits level 1": fused(
        lambda g: g.nbits(8, 1),
        8,
        kernel="MatMulNBits level 1, 8 bits, block 32: unpacked at every call",
        compute="float",
        activations="float32",
        traps=("8-bit-without-level-4",),
    ),
    "group index": fused(
        lambda g: g.nbits(4, 4, group_index=True),
        4,
        kernel="MatMulNBits level 4, 4 bits, block 32: unpacked at every call",
        compute="float",
        activations="float32",
        traps=("g-idx-or-float-zero-points",),
    ),
    "8 bits level 4, group index": fused(
        lambda g: g.nbits(8, 4, group_index=True),
        8,
        kernel="MatMulNBits level 4, 8 bits, block 32: unpacked at every call",
        compute="float",
        activations="float32",
        traps=("g-idx-or-float-zero-points",),
    ),
    # the rest
    "MatMulInteger u8": integer(lambda g: g.integers("UINT8"), "MatMulInteger", "uint8"),
    "MatMulInteger s8": integer(
        lambda g: g.integers("INT8"), "MatMulInteger int8 × int8, unoptimised", "int8", "int8-by-int8"
    ),
    "fp8 weights": unfused(lambda g: g.weight_only("FLOAT8E4M3FN"), "float32"),
    "fp8 weights e5m2": unfused(lambda g: g.weight_only("FLOAT8E5M2"), "float32"),
    "fp8 weights and activations, level basic": unfused(
        lambda g: g.static("FLOAT8E4M3FN", "FLOAT8E4M3FN"), "rounded to fp8_e4m3fn", level="basic"
    ),
    "fp8 with the remedy": Case(
        graph=lambda g: g.static("FLOAT8E4M3FN", "FLOAT8E4M3FN"),
        kernel="MatMul float32",
        compute="float",
        activations="rounded to fp8_e4m3fn",
        operators=("MatMul",),
        config={"session.disable_quant_qdq": "1"},
    ),
    "float32": Case(
        graph=lambda g: g.plain("FLOAT"),
        kernel="MatMul float32",
        compute="float",
        activations="float32",
        operators=("MatMul",),
    ),
    "float16": Case(
        graph=lambda g: g.plain("FLOAT16"),
        kernel="MatMul float32",
        compute="float",
        activations="float32",
        operators=("Cast", "MatMul"),
        traps=("half-floats",),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_row(
    case: Case,
    graphs: SimpleNamespace,
    saved: Callable[[Any], Path],
    really_runs: Callable[..., dict[str, int]],
) -> None:
    path = saved(case.graph(graphs))
    found = explain(path, Settings(level=case.level, config=case.config))
    assert found.nodes == really_runs(path, LEVELS[case.level], dict(case.config))
    assert set(case.operators) <= set(found.nodes)
    (linear,) = found.linears
    assert linear.kernel == case.kernel
    assert linear.compute == case.compute
    assert case.activations in linear.activations
    assert (linear.k, linear.n) == (128, 96)
    assert linear.name == "model.layers.0.mlp.up_proj"
    assert tuple(trap.code for trap in found.traps) == case.traps
    assert found.level == case.level


def test_fp8_that_does_not_load_is_shown_at_the_level_that_loads_with_the_remedy(
    graphs: SimpleNamespace, saved: Callable[[Any], Path], really_runs: Callable[..., dict[str, int]]
) -> None:
    path = saved(graphs.static("FLOAT8E4M3FN", "FLOAT8E4M3FN"))
    found = explain(path)
    assert found.level == "basic"
    assert found.nodes == really_runs(path, "ORT_ENABLE_BASIC")
    assert found.linears[0].kernel == UNFUSED
    refused = next(trap for trap in found.traps if trap.code == "fp8-does-not-load")
    assert refused.warning
    assert "session.disable_quant_qdq=1" in refused.remedy
    assert "ORT_ENABLE_BASIC" in refused.remedy
    with pytest.raises(Exception, match="float8"):  # a runtime that learns it shall tell us
        really_runs(path)


def test_bfloat16_is_refused_with_what_to_do(graphs: SimpleNamespace, saved: Callable[[Any], Path]) -> None:
    with pytest.raises(InputRefused, match="no kernels for bfloat16: export in float32") as refusal:
        explain(saved(graphs.plain("BFLOAT16")))
    assert "#linear" not in str(refusal.value)
