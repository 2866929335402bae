"""The head of a language model: the product behind the output "logits", and for how many tokens it is computed."""

from __future__ import annotations

from qtool.runtime.explain.graph import GraphView, Node, input_at
from qtool.runtime.explain.linears import linear_of

LOGITS = "logits"
SELECTING = ("Gather", "Slice", "GatherND", "GatherElements")
_SEARCH_DEPTH = 6


def head_of(view: GraphView) -> Node | None:
    """The product behind the logits, past casts, biases and caps; None where there is none near."""
    node = view.producer.get(LOGITS) if LOGITS in view.outputs else None
    for _ in range(_SEARCH_DEPTH):
        if node is None or linear_of(view, node) is not None:
            return node
        node = next((view.producer[name] for name in node.input if name in view.producer), None)
    return None


def last_token_only(view: GraphView) -> bool:
    """Whether the graph hands out one row of logits, or picks tokens between the last block and the head."""
    dims = view.outputs[LOGITS][1]
    if len(dims) == 3 and isinstance(dims[1], int):
        return dims[1] == 1
    node = head_of(view)
    for _ in range(_SEARCH_DEPTH):
        before = view.producer.get(input_at(node, 0)) if node is not None else None
        if before is None or linear_of(view, before) is not None:
            return False
        if before.op_type in SELECTING:
            return True
        node = before
    return False
