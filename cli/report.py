"""How results look on a terminal: one function for each kind of result."""

from __future__ import annotations

from collections import Counter
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli.progress import out, table

if TYPE_CHECKING:
    from qtool.runtime.gate import Verdict

MAX_SKIPPED = 20


def print_quantization(report: dict[str, Any]) -> None:
    """The summary line, the bit-width table, the worst layers, and every skipped module with its reason."""
    rows = [
        [row["scheme"], row["modules"], f"{row['parameters']:,}", f"{100 * row['share']:.1f} %"]
        for row in report["table"]
    ]
    table("bit widths", ["scheme", "modules", "parameters", "share"], rows)
    measured = [(name, layer) for name, layer in report["layers"].items() if layer["output_error"] is not None]
    worst = sorted(measured, key=lambda item: -item[1]["output_error"])[:5]
    if worst:
        errors = [[name, f"{layer['output_error']:.2e}", f"{layer['weight_error']:.2e}"] for name, layer in worst]
        table("largest relative output errors on the calibration text", ["module", "output", "weight"], errors)
    escalated = [name for name, layer in report["layers"].items() if layer["escalations"]]
    if escalated:
        out.print(f"damping was raised in {len(escalated)} layers, first {escalated[0]}", markup=False)
    if (distilled := report.get("distilled")) is not None:
        kept = f"epoch {distilled['epoch']}" if distilled["epoch"] else "the start: nothing helped"
        kl = " to ".join(f"{distilled[f'kl_{when}']:.4f}" for when in ("before", "after"))
        perplexity = " to ".join(f"{exp(distilled[f'loss_{when}']):.3f}" for when in ("before", "after"))
        out.print(f"distilled: KL {kl} nats, perplexity {perplexity} on held-back sequences ({kept})", markup=False)
    for line in report["notes"]:
        out.print(f"note: {line}", markup=False)
    for module, reason in list(report["skipped"].items())[:MAX_SKIPPED]:
        out.print(f"skipped {module}: {reason}", markup=False)
    if len(report["skipped"]) > MAX_SKIPPED:
        out.print(f"… and {len(report['skipped']) - MAX_SKIPPED} more; --json lists all", markup=False)
    out.print(
        f"quantized {report['quantized']}/{report['linears']} linears, "
        f"{100 * report['quantized_share']:.1f} % of parameters, "
        f"{report['bits_per_weight']:.3f} bits per weight with scales",
        markup=False,
    )


def print_evaluation(summary: dict[str, Any], output: Path | None) -> None:
    """The numbers of an evaluation."""
    rows: list[list[Any]] = [["perplexity", f"{summary['perplexity']:.4f}"]]
    if (reference := summary["reference"]) is not None:
        increase = summary["perplexity"] / reference["perplexity"] - 1
        rows += [
            ["reference perplexity", f"{reference['perplexity']:.4f}"],
            ["increase", f"{100 * increase:+.2f} %"],
            ["KL(reference ‖ subject), nats a token", f"{reference['kl_nats']:.5f}"],
            ["top-1 agreement", f"{100 * reference['top1_agreement']:.2f} %"],
        ]
    table(f"{summary['subject']}, {summary['sequences']} × {summary['length']} tokens", ["", "value"], rows)
    if output is not None:
        out.print(f"wrote {output}", markup=False)


def print_verdict(verdict: Verdict) -> None:
    """The gate's table and its answer."""
    rows = [
        [
            row.metric,
            *("–" if value is None else f"{value:.4f}" for value in (row.baseline, row.current)),
            f"{row.difference:.5f}",
            f"{row.low:.5f} … {row.high:.5f}",
            "–" if row.limit is None else f"{row.limit:g}",
            row.outcome,
        ]
        for row in verdict.rows
    ]
    columns = ["metric", "baseline", "current", "difference", "95 % interval", "limit", "outcome"]
    table(f"gate, {verdict.tokens} tokens", columns, rows)
    out.print("passed" if verdict.passed else "failed")


def print_verification(result: dict[str, Any]) -> None:
    """A verification's checks, from its JSON form: fresh, or as a package stores it."""
    rows = [
        [
            check["name"],
            check["outcome"],
            _numbers(check["numbers"], check["limits"]),
            check["detail"],
        ]
        for check in result["checks"]
    ]
    table("verification", ["check", "outcome", "measured (limit)", "detail"], rows)


def print_plan(plan: dict[str, Any]) -> None:
    """A plan's steps with the numbers that decided them, and how many sites got what."""
    rows = [
        [
            step["name"],
            f"{step['predicted_kl_nats']:.4f}",
            "-" if step["kl_nats"] is None else f"{step['kl_nats']:.4f}",
            "-" if step["perplexity_increase"] is None else f"{100 * step['perplexity_increase']:+.2f} %",
            "-" if step["bits"] is None else f"{step['bits']:.3f}",
            f"{step['decode']:.3f}",
            f"{step['prefill']:.3f}",
            "kept" if step["kept"] else "rolled back",
            step["why"],
        ]
        for step in plan["steps"]
    ]
    heads = ["step", "KL predicted", "KL measured", "perplexity", "bits", "decode ×", "prefill ×", "", "why"]
    table("steps on the whole model", heads, rows)
    chosen = Counter(site["chosen"] for site in plan["sites"])
    table("what sites got", ["candidate", "sites"], [[name, count] for name, count in sorted(chosen.items())])


def print_npu(details: dict[str, Any]) -> None:
    """What is in a package of --target npu, from its manifest's details."""
    npu = details["npu"]
    shapes, calibration, rounded = npu["shapes"], npu["calibration"], len(npu["rounded_at_export"])
    rows: list[list[Any]] = [
        ["graphs", f"prefill of {shapes['chunk']} tokens, decode of 1, {shapes['context']} slots"],
        ["nodes", ", ".join(f"{count} in {name}" for name, count in npu["node_types"].items())],
        ["16 bits by measurement", len(npu["measured_islands"])],
        ["weights", f"{details['bits_per_weight']:.2f} bits, {rounded} linears rounded at export"],
        ["calibrated on", f"{calibration['windows']} × {calibration['length']} tokens"],
        ["sites from statistics", calibration["sites_from_statistics"]],
    ]
    table("NPU package", ["", "value"], rows)


def _numbers(numbers: dict[str, float | None], limits: dict[str, float]) -> str:
    shown = [f"{name} {numbers[name]} (≤ {limit})" for name, limit in limits.items()]
    if (agreement := numbers.get("top1_agreement")) is not None:
        shown.append(f"top-1 {100 * agreement:.1f} %")
    return "\n".join(shown)
