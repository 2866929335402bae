"""Traps of a whole graph: what does not load, the KV cache, the embedding, the head."""

from __future__ import annotations

from qtool.runtime.explain.costs import is_cache
from qtool.runtime.explain.facts import Facts, warn
from qtool.runtime.explain.graph import GraphView, input_at
from qtool.runtime.explain.head import head_of, last_token_only
from qtool.runtime.explain.report import Trap

LOOKUPS = ("Gather", "GatherND", "GatherElements")


def fp8_refused(facts: Facts) -> Trap | None:
    """FP8 activations and weights: the fusion makes an operator that knows no FP8."""
    if facts.refused is None:
        return None
    return Trap(
        code="fp8-does-not-load",
        warning=True,
        what="the FP8 graph does not load at the runtime's default optimization level; what is shown is level basic",
        remedy="load it with graph_optimization_level ORT_ENABLE_BASIC or with session.disable_quant_qdq=1 "
        "(--session session.disable_quant_qdq=1 explains that)",
    )


def table_dequantized(facts: Facts) -> Trap | None:
    """The whole embedding dequantized to look up one row."""
    where = tuple(
        facts.name(node)
        for node in facts.view.nodes
        if node.op_type in LOOKUPS and _made_by(facts.view, input_at(node, 0), "DequantizeLinear")
    )
    return warn(
        "embedding-dequantized",
        "the whole embedding is dequantized at every call to look up a few rows",
        "look up codes and dequantize the rows, or use GatherBlockQuantized",
        where,
    )


def no_cache(facts: Facts) -> Trap | None:
    """A language model that computes all tokens again for each new one."""
    if "input_ids" not in facts.view.inputs or head_of(facts.view) is None:
        return None
    if any(is_cache(name) for name in facts.view.inputs):
        return None
    return Trap(
        code="no-cache",
        warning=True,
        what="the graph has no KV cache: every new token computes the whole text again",
        remedy="export with past_key_values (transformers.js and optimum: the with-past or merged decoder)",
    )


def cache_not_in_place(facts: Facts) -> Trap | None:
    """A decoder without GroupQueryAttention copies its cache at every step."""
    caches = [name for name in facts.view.inputs if is_cache(name)]
    if not caches or any(node.op_type == "GroupQueryAttention" for node in facts.view.nodes):
        return None
    copies = tuple(
        facts.name(node) for node in facts.view.nodes if node.op_type == "Concat" and set(node.input) & set(caches)
    )
    return Trap(
        code="cache-not-in-place",
        warning=True,
        what="no GroupQueryAttention: every step copies the KV cache and runs attention in many nodes; "
        "decoding is 4 to 5 times as slow at the same weights",
        remedy="export with GroupQueryAttention and bind past and present to one buffer",
        where=copies,
    )


def all_logits(facts: Facts) -> Trap | None:
    """The head is computed for every token of the prompt."""
    node = head_of(facts.view)
    if node is None or last_token_only(facts.view):
        return None
    name = facts.names.get(id(node))
    head = next((linear for linear in facts.linears if linear.name == name), None)
    share = f", {100 * head.prefill_share:.0f} % of the predicted prefill" if head is not None else ""
    return Trap(
        code="all-logits",
        warning=True,
        what=f"prefill computes the logits of every token of the prompt{share}; generating reads the last token's",
        remedy="export with the last token's logits only, unless you score text with it",
        where=(head.name,) if head is not None else (),
    )


def _made_by(view: GraphView, value: str, operator: str) -> bool:
    node = view.producer.get(value)
    return node is not None and node.op_type == operator and bool(view.made_of(value))
