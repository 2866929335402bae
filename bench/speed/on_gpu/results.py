"""The rows' file and the printed tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from on_gpu.budget import Row


def write(path: Path, facts: dict[str, Any], rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """One row a line, so that two files can be compared."""
    head = json.dumps({**facts, "left_out": list(left_out)}, indent=1)[:-2]
    body = ",\n  ".join(json.dumps(rounded(row), ensure_ascii=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n  {body}\n ]\n}}\n', encoding="utf-8")


def rounded(value: Any) -> Any:
    """Floats with four digits that count."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def show(console: Console, rows: Sequence[Row], left_out: Sequence[str]) -> None:
    """All tables."""
    for k, n in dict.fromkeys((row["k"], row["n"]) for row in rows if row["kind"] == "product"):
        _products(console, [row for row in rows if row["kind"] == "product" and (row["k"], row["n"]) == (k, n)], k, n)
    _rows(console, [row for row in rows if row["kind"] == "rows"])
    _tokens(console, [row for row in rows if row["kind"] == "tokens"])
    for row in rows:
        if row["kind"] == "failed":
            console.print(f"{row['name']} failed: {row['reason']}", markup=False)
    _targets(console, [row for row in rows if row["kind"] == "target"])
    if left_out:
        names = ", ".join(left_out)
        console.print(f"left out for want of time ({len(left_out)}): {names}", markup=False, soft_wrap=True)


def _products(console: Console, rows: Sequence[Row], k: int, n: int) -> None:
    peers = list(dict.fromkeys(peer for row in rows for peer in row.get("times_faster_than", ())))
    table = Table(title=f"{k} → {n}: µs (20th percentile), times faster than peers in the same rounds")
    for name in ("M", "kernel", "µs", "± %", "TB/s", "TFLOP/s", "% of floor", *(f"× {peer}" for peer in peers)):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in sorted(rows, key=lambda row: row["m"]):
        if "reason" in row:
            table.add_row(str(row["m"]), row["name"], "–", "", "", "", "", *[""] * len(peers))
            continue
        faster = row["times_faster_than"]
        table.add_row(
            str(row["m"]),
            f"[bold]{row['name']}[/bold]" if row["ours"] else row["name"],
            f"{row['us']['p20']:.1f}",
            f"{row['us']['spread'] * 50:.1f}",
            f"{row['tb_per_s']:.2f}",
            f"{row['tflop_per_s']:.0f}",
            f"{row['share_of_floor'] * 100:.0f}",
            *(f"{faster[peer]:.2f}" if peer in faster else "" for peer in peers),
        )
    console.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            reasons.setdefault((row["name"], row["reason"]), []).append(str(row["m"]))
    for (name, reason), ms in reasons.items():
        console.print(f"  {name}, M {', '.join(ms)}: {reason}", markup=False)


def _rows(console: Console, rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table("kernel", "rows", "µs", "± %", "TB/s", "% of floor", title="Rows of bfloat16")
    for row in rows:
        if "reason" in row:
            table.add_row(row["name"], f"{row['m']} × {row['k']}", row["reason"])
            continue
        us = row["us"]
        table.add_row(
            row["name"],
            f"{row['m']} × {row['k']}",
            f"{us['p20']:.1f}",
            f"{us['spread'] * 50:.1f}",
            f"{row['tb_per_s']:.2f}",
            f"{row['share_of_floor'] * 100:.0f}",
        )
    console.print(table)


def _tokens(console: Console, rows: Sequence[Row]) -> None:
    if not rows:
        return
    columns = ("model", "what", "tokens/s", "low – high", "ms a step", "how", "× transformers")
    table = Table(*columns, title=f"Tokens/s, {rows[0]['shape']}")
    for row in rows:
        what = f"{row['phase']} batch {row['batch']}" + (f" of {row['tokens']}" if row["phase"] == "prefill" else "")
        if "reason" in row:
            table.add_row(row["name"], what, "–", "", "", row["reason"])
            continue
        speed = row["tokens_per_s"]
        table.add_row(
            f"[bold]{row['name']}[/bold]" if row["ours"] else row["name"],
            what,
            f"{speed['median']:.0f}",
            f"{speed['low']:.0f} – {speed['high']:.0f}",
            f"{row['ms']:.3f}",
            row["how"],
            ", ".join(f"{each:.2f} ({how})" for how, each in row.get("times_transformers", {}).items()),
        )
    console.print(table)


def _targets(console: Console, rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table("target", "µs at most", "reached", "by", title="Targets (an H200's)")
    for row in rows:
        got = "not timed" if row["us"] is None else f"{row['us']:.1f}" + ("" if row["reached"] else "  missed")
        table.add_row(row["text"], f"{row['most_us']:g}", got, row["name"] or "")
    console.print(table)
