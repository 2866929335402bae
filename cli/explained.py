"""How an explanation looks on a terminal: linears by role, everything else by kind, warnings last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich import markup

from qtool.cli.progress import err, out, table
from qtool.errors import escape

if TYPE_CHECKING:
    from qtool.runtime.explain.report import Explanation, LinearReport, Measured

COLUMNS = ["linear", "", "in the file", "kernel", "compute", "activations", "MB", "decode", "prefill"]


def print_explanation(explanation: Explanation, *, every: bool) -> None:
    """The tables on standard output, the warnings on standard error.

    Args:
        explanation: of one file.
        every: one line for every linear, not for every role.
    """
    from qtool.runtime.explain import online_line

    groups = _groups(explanation.linears, every=every)
    rows = [_row(name, linears) for name, linears in groups]
    rows += [
        [part.name, part.nodes, "", "", "", "", "", _percent(part.decode_share), _percent(part.prefill_share)]
        for part in explanation.parts
    ]
    config = "".join(f", {key}={value}" for key, value in explanation.config.items())
    table(
        _safe(f"{explanation.file}: onnxruntime {explanation.onnxruntime}, level {explanation.level}{config}"),
        COLUMNS,
        rows,
    )
    nodes = sum(explanation.nodes.values())
    out.print(
        f"{nodes} nodes a step; {explanation.weight_bytes / 1e6:.1f} MB of weights a token, "
        f"{explanation.cache_bytes / 1e6:.1f} MB of KV cache at {explanation.length} tokens",
        markup=False,
    )
    out.print(
        "MB: weights that a token reads; "
        f"decode, prefill: predicted shares of a step and of {explanation.length} tokens, "
        f"by rates of {explanation.predicted_from}"
        + ("" if explanation.measured else "; --profile measures them"),
        markup=False,
    )
    if (line := online_line(explanation)) is not None:
        out.print(line, markup=False)
    if explanation.measured is not None:
        _print_measured(explanation.measured)
    for trap in explanation.traps:
        label = "WARNING" if trap.warning else "note"
        err.print(f"{label}: {escape(trap.line())}", markup=False, style="bold red" if trap.warning else None)
    if not explanation.warnings:
        out.print("no warnings", markup=False)


def _groups(linears: Iterable[LinearReport], *, every: bool) -> list[tuple[str, list[LinearReport]]]:
    groups: dict[tuple[object, ...], list[LinearReport]] = {}
    for linear in linears:
        alike = (linear.role, linear.kernel, linear.activations, linear.stored, linear.source, linear.k, linear.n)
        groups.setdefault((linear.name,) if every else alike, []).append(linear)
    return [(found[0].role if len(found) > 1 else found[0].name, found) for found in groups.values()]


def _row(name: str, linears: list[LinearReport]) -> list[Any]:
    first = linears[0]
    return [
        _safe(name.removeprefix("model.")),
        len(linears),
        first.stored if first.kernel.startswith(first.source) else f"{first.source}, {first.stored}",
        first.kernel,
        first.compute,
        first.activations,
        f"{sum(linear.weight_bytes for linear in linears) / 1e6:.2f}",
        _percent(sum(linear.decode_share for linear in linears)),
        _percent(sum(linear.prefill_share for linear in linears)),
    ]


def _print_measured(measured: Measured) -> None:
    rows = [
        [_safe(kind), count, _percent(decode), _percent(prefill)]
        for kind, (count, decode, prefill) in measured.rows.items()
    ]
    table(
        f"measured with {measured.threads} threads: a step {measured.decode_ms:.2f} ms (median of {measured.steps}), "
        f"{measured.tokens} tokens {measured.prefill_ms:.1f} ms, in nodes",
        ["node", "", "decode", "prefill"],
        rows,
    )


def _safe(text: str) -> str:
    """Text out of a file, without control characters, as rich prints it unchanged."""
    return markup.escape(escape(text))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
