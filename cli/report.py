"""How results look on a terminal: one function for each kind of result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli.progress import out, table

if TYPE_CHECKING:
    pass


def print_evaluation(summary: dict[str, Any], output: Path | None) -> None:
    """The numbers of an evaluation."""
    sequences, length = summary["tokens"]
    rows: list[list[Any]] = [["perplexity", f"{summary['perplexity']:.4f}"]]
    if summary["reference_perplexity"] is not None:
        increase = summary["perplexity"] / summary["reference_perplexity"] - 1
        rows += [
            ["reference perplexity", f"{summary['reference_perplexity']:.4f}"],
            ["increase", f"{100 * increase:+.2f} %"],
            ["KL(reference ‖ subject), nats a token", f"{summary['kl_nats']:.5f}"],
            ["top-1 agreement", f"{100 * summary['top1_agreement']:.2f} %"],
        ]
    table(f"{summary['subject']}, {sequences} × {length} tokens", ["", "value"], rows)
    if output is not None:
        out.print(f"wrote {output}", markup=False)
