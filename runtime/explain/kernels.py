"""The recognition table: from a node of the optimized graph to what the CPU provider computes.

What a node becomes is read off its operator, its attributes and its neighbours. Facts about operators: what a level
computes is in MatMulNBits' schema, and only 4 is integer arithmetic on the CPU; products of floats with 8-bit codes,
permuted groups or float zero points have no kernel of their own and unpack the whole weight at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qtool.runtime.explain.graph import GraphView, Node, attribute, input_at
from qtool.runtime.explain.linears import Linear, linear_of

FORCE_FLOAT = "mlas.qnbit.force_fp32"
FLOAT_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What computes a linear.

    Attributes:
        label: the kernel: "MatMulNBits level 4, 4 bits, block 32".
        compute: "integer", "float", or "unknown" for an operator that the table does not hold.
        activations: their precision inside the product, and for integers how far one scale reaches.
        rate: a key of `costs.RATES`.
    """

    label: str
    compute: str
    activations: str
    rate: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A node together with what the table asks about it."""

    view: GraphView
    node: Node
    linear: Linear | None
    config: Mapping[str, str]

    @property
    def level(self) -> int:
        """accuracy_level of a MatMulNBits, as its kernel takes it."""
        level = attribute(self.node, "accuracy_level")
        return 1 if level == 4 and self.config.get(FORCE_FLOAT) == "1" else level

    @property
    def bits(self) -> int:
        """Bits of a MatMulNBits."""
        return attribute(self.node, "bits", 4)

    def unpacks(self) -> bool:
        """Whether a MatMulNBits makes the whole float weight at every call."""
        zero = input_at(self.node, 3)
        floats = zero != "" and self.view.dtype(zero) != "uint8"
        return input_at(self.node, 4) != "" or floats or (self.bits == 8 and self.level != 4)

    def between(self) -> str:
        """The operator that makes the weight at every call, "" where the weight is stored as it is used."""
        return str(self.linear.between[0].op_type) if self.linear is not None and self.linear.between else ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: which nodes, and what they compute. `{…}` in a label is filled from the node."""

    operators: tuple[str, ...]
    where: Callable[[Candidate], bool]
    label: str
    compute: str
    activations: Callable[[Candidate], str]
    rate: str


def _always(_: Candidate) -> bool:
    return True


def _says(text: str) -> Callable[[Candidate], str]:
    return lambda candidate: text


def _by_block(candidate: Candidate) -> str:
    rounded = rounded_input(candidate.view, input_at(candidate.node, 0))
    before = f", rounded to {rounded} before" if rounded else ""
    return f"int8 by token and block{before}"


def _of_input(index: int) -> Callable[[Candidate], str]:
    return lambda candidate: integer_input(candidate.view, input_at(candidate.node, index))


def _floats(candidate: Candidate) -> str:
    rounded = rounded_input(candidate.view, input_at(candidate.node, 0))
    return f"float32, rounded to {rounded} before" if rounded else "float32"


# The first row that fits is it.
ROWS: tuple[Row, ...] = (
    Row(
        operators=("MatMulNBits",),
        where=Candidate.unpacks,
        label="MatMulNBits level {level}, {bits} bits, block {block}: unpacked at every call",
        compute="float",
        activations=_floats,
        rate="nbits unpacked",
    ),
    Row(
        operators=("MatMulNBits",),
        where=lambda candidate: candidate.level == 4,
        label="MatMulNBits level 4, {bits} bits, block {block}",
        compute="integer",
        activations=_by_block,
        rate="nbits integer",
    ),
    Row(
        operators=("MatMulNBits",),
        where=_always,
        label="MatMulNBits level {level}, {bits} bits, block {block}",
        compute="float",
        activations=_floats,
        rate="nbits float",
    ),
    Row(
        operators=("QLinearMatMul", "QGemm"),
        where=_always,
        label="{op}",
        compute="integer",
        activations=_of_input(0),
        rate="QLinearMatMul",
    ),
    Row(
        operators=("MatMulIntegerToFloat",),
        where=_always,
        label="{op}",
        compute="integer",
        activations=_of_input(0),
        rate="MatMulIntegerToFloat",
    ),
    Row(
        operators=("DynamicQuantizeMatMul",),
        where=_always,
        label="{op}",
        compute="integer",
        activations=_says("uint8 per tensor, one scale for all tokens of a call"),
        rate="DynamicQuantizeMatMul",
    ),
    Row(
        operators=("MatMulInteger",),
        where=lambda candidate: candidate.view.dtype(input_at(candidate.node, 0)) == "int8",
        label="{op} int8 × int8, unoptimised",
        compute="integer",
        activations=_of_input(0),
        rate="MatMulInteger s8",
    ),
    Row(
        operators=("MatMulInteger",),
        where=_always,
        label="{op}",
        compute="integer",
        activations=_of_input(0),
        rate="MatMulInteger",
    ),
    Row(
        operators=FLOAT_PRODUCTS,
        where=lambda candidate: candidate.between() == "DequantizeLinear",
        label="DequantizeLinear at every call + {op} float32",
        compute="float",
        activations=_floats,
        rate="dequantized",
    ),
    Row(
        operators=FLOAT_PRODUCTS,
        where=lambda candidate: candidate.between() != "",
        label="{between} of the weight at every call + {op} float32",
        compute="float",
        activations=_floats,
        rate="dequantized",
    ),
    Row(
        operators=FLOAT_PRODUCTS,
        where=_always,
        label="{op} float32",
        compute="float",
        activations=_floats,
        rate="float",
    ),
)


def recognise(view: GraphView, node: Node, config: Mapping[str, str]) -> Kernel:
    """What computes this node; an operator that the table does not hold is called by its own name."""
    candidate = Candidate(view=view, node=node, linear=linear_of(view, node), config=config)
    for row in ROWS:
        if node.op_type in row.operators and row.where(candidate):
            label = row.label.format(
                op=node.op_type,
                bits=candidate.bits,
                level=candidate.level,
                block=attribute(node, "block_size"),
                between=candidate.between(),
            )
            return Kernel(label=label, compute=row.compute, activations=row.activations(candidate), rate=row.rate)
    return Kernel(label=str(node.op_type), compute="unknown", activations="unknown", rate="float")


def rounded_input(view: GraphView, value: str) -> str:
    """What Q-DQ rounds a float value to ("uint16 per tensor"), "" where nothing does."""
    dequantize = view.producer.get(value)
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or view.made_of(value):
        return ""
    return integer_input(view, input_at(dequantize, 0))


def integer_input(view: GraphView, codes: str) -> str:
    """The type of quantized activations and how far one of their scales reaches."""
    dtype = view.dtype(codes) or "8 bits"
    node = view.producer.get(codes)
    if node is None:
        return dtype
    if node.op_type == "DynamicQuantizeLinear":
        return f"{dtype} per tensor, one scale for all tokens of a call"
    if node.op_type == "QuantizeLinear" and _row_normalised(view, input_at(node, 0)):
        return f"{dtype} per token (rows divided by their maxima)"
    if node.op_type == "QuantizeLinear":
        return f"{dtype} per tensor, fixed scale"
    return dtype


def _row_normalised(view: GraphView, value: str) -> bool:
    divided = view.producer.get(value)
    if divided is None or divided.op_type not in ("Div", "Mul"):
        return False
    ancestors = [view.producer.get(name) for name in divided.input]
    for _ in range(3):  # a clip against zero rows, a reciprocal, or a product with a constant may stand between
        if any(node is not None and node.op_type == "ReduceMax" for node in ancestors):
            return True
        ancestors = [view.producer.get(name) for node in ancestors if node is not None for name in node.input]
    return False
