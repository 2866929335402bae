"""One breach of one rule."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.errors import escape

RULES: dict[str, str] = {
    "opset": "the operator sets have the types that are used, and no foreign ones",
    "static-shape": "every dimension is a positive number",
    "rank": "no tensor has more than 5 dimensions",
    "control-flow": "no If, Loop, Scan, and no functions",
    "operator": "every operator has a builder in the execution provider",
    "attribute": "operators are used in the form that their builder takes",
    "quantized-edge": "every float tensor between two operators goes through QuantizeLinear and DequantizeLinear",
    "activation-type": "a node's activations and its output have one type: uint8, uint16, int8 or int16",
    "same-scale": "operators that only move values keep their input's scale and zero point",
    "constant-scale": "scales and zero points are constants, scales positive and finite",
    "weight-type": "constants that are multiplied are int4, uint4, int8 or uint8",
    "weight-axis": "scales per channel lie along a weight's output channels, blocks along its inputs",
    "weight-symmetry": "signed weights have zero points of zero",
}


@dataclass(frozen=True, kw_only=True)
class Breach:
    """A node that breaks a rule.

    Attributes:
        rule: a key of RULES.
        node: the node's name, or the tensor's where no node is at fault.
        why: what is wrong.
        remedy: what would be right.
    """

    rule: str
    node: str
    why: str
    remedy: str

    def line(self) -> str:
        """The breach on one line."""
        return escape(f"{self.rule}: {self.node}: {self.why}; {self.remedy}")

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {"rule": self.rule, "node": self.node, "why": self.why, "remedy": self.remedy}
