"""The KL of committed rows, a panel a scheme: `python bench/accuracy/plot.py docs/accuracy.svg ROWS...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

PANELS = ("W4A8", "W4A4", "W8A8 per tensor")
OURS, THEIRS = "tab:blue", "tab:gray"


def main() -> None:
    output, *paths = sys.argv[1:]
    rows = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    mpl.rcParams.update({"svg.hashsalt": "qtool", "svg.fonttype": "none", "font.size": 8})
    picture(rows).savefig(output, format="svg", metadata={"Date": None})


def picture(rows: list[dict[str, Any]]) -> Figure:
    """A panel for each scheme, the rows calibrated in domain and the peers', best first."""
    panels = [[bar for row in rows if (bar := _bar(row, scheme))] for scheme in PANELS]
    figure = Figure(figsize=(8, 0.19 * sum(map(len, panels)) + 1.5), layout="constrained")
    axes = figure.subplots(len(PANELS), 1, height_ratios=[max(1, len(bars)) for bars in panels], sharex=True)
    for scheme, axis, bars in zip(PANELS, axes, panels, strict=True):
        bars.sort(key=lambda bar: -bar[1])
        drawn = axis.barh([name for name, _, _ in bars], [kl for _, kl, _ in bars], color=[c for *_, c in bars])
        axis.bar_label(drawn, fmt="%.3f", padding=2, fontsize=7)
        axis.set_xscale("log")
        axis.set_title(scheme, loc="left", fontsize=9, fontweight="bold")
        axis.margins(x=0.15, y=0.02)
    figure.supxlabel(
        "KL to the float model, nats; less is better (in brackets bits per weight, everything counted)", fontsize=8
    )
    return figure


def _bar(row: dict[str, Any], scheme: str) -> tuple[str, float, str] | None:
    name = row["row"]
    if "error" in row or "planted" in name:
        return None
    bits = f"({row['bits_per_weight_quantized']:.2f})"
    if name.startswith(f"{scheme} | ") and " | in domain" in name:
        _, *what = name.split(" | ")
        return f"{', '.join(part for part in what if part != 'in domain')} {bits}", row["kl_nats"], OURS
    if " | " not in name and name.endswith(f" {scheme}"):
        return f"{name.removesuffix(scheme)}{bits}", row["kl_nats"], THEIRS
    return None


if __name__ == "__main__":
    main()
