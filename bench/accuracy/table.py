"""The committed rows as Markdown: `python bench/accuracy/table.py bench/results/transforms-smollm2.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HEAD = "| row | perplexity | × float | KL, nats | top-1 | bits |\n|---|---:|---:|---:|---:|---:|"


def main() -> None:
    print(HEAD)
    for path in sys.argv[1:]:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            if "error" in row:
                print(f"| {row['row'].replace(' | ', ', ')} | {row['error']} | | | | |")
                continue
            name, bits = row["row"].replace(" | ", ", "), row["bits_per_weight_quantized"]
            kl, same = row["kl_nats"], row["top1_agreement"]
            scores = f"{row['perplexity']:.2f} | {row['ratio']:.3f} | {kl:.4f} | {same:.1%}"
            print(f"| {name} | {scores} | {bits:.2f} |")
            if "package_perplexity" in row:
                perplexity = row["package_perplexity"]
                ratio, bits = perplexity / row["float_perplexity"], row["package_bits_per_weight_quantized"]
                kl = row["package_kl_nats"]
                print(f"| {name}, its package | {perplexity:.2f} | {ratio:.3f} | {kl:.4f} | | {bits:.2f} |")


if __name__ == "__main__":
    main()
