"""The committed rows as Markdown, a table for each scheme: `python bench/accuracy/table.py ROWS...`.

A cell is perplexity over the float model's, KL in nats, bits per weight with everything counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rows import METHODS, QUANTIZERS, SCHEMES

ORDER = {name: index for index, name in enumerate([*SCHEMES, *METHODS, *QUANTIZERS, "in domain", "built-in"])}
MISSING = ""


def main() -> None:
    rows = [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    ours = [row for row in rows if row["row"].count(" | ") >= 3]
    for scheme in sorted({row["row"].split(" | ")[0] for row in ours}, key=_place):
        print(f"**{scheme}**\n")
        print("\n".join(grid(row for row in ours if row["row"].split(" | ")[0] == scheme)) + "\n")
    print("**Peers**\n\n" + "\n".join(peers(row for row in rows if row["row"].count(" | ") < 3)))


def grid(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Methods by quantizers, one scheme."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        _, method, quantizer, *where = row["row"].split(" | ")
        cells.setdefault((method, *where), {})[quantizer] = _cell(row)
        if "package_perplexity" in row:
            ratio = row["package_perplexity"] / row["float_perplexity"]
            scores = _scores(ratio, row["package_kl_nats"], row["package_bits_per_weight_quantized"])
            cells.setdefault((method, *where, "ONNX Runtime"), {})[quantizer] = scores
    columns = sorted({quantizer for found in cells.values() for quantizer in found}, key=_place)
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for key in sorted(cells, key=lambda key: [_place(part) for part in key]):
        lines.append(f"| {', '.join(key)} | {' | '.join(cells[key].get(column, MISSING) for column in columns)} |")
    return lines


def peers(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Other tools' rows; those that could not run say why."""
    lines = ["| peer | × float, KL, bits |", "|---|---:|"]
    return lines + [f"| {row['row']} | {row['error'] if 'error' in row else _cell(row)} |" for row in rows]


def _cell(row: dict[str, Any]) -> str:
    return _scores(row["ratio"], row["kl_nats"], row["bits_per_weight_quantized"])


def _scores(ratio: float, kl: float, bits: float) -> str:
    return f"{ratio:.3f}, {kl:.4f}, {bits:.2f}"


def _place(name: str) -> int:
    return ORDER.get(name, len(ORDER))


if __name__ == "__main__":
    main()
