"""What each transform is worth: perplexity, KL and top-1 of SmolLM2-135M-Instruct by scheme × transform × quantizer.

`python bench/accuracy/transforms.py --text FILE` scores on the second half of a text, calibrated on the first half
("in domain") and on the built-in corpus; without --text both halves are the built-in ones. Rows are appended to the
output as they come, and rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from smollm2 import fetch

ROOT = Path(__file__).parents[2]
QTOOL = str(Path(sys.executable).parent / "qtool")
SCORED = ("--sequences", "16", "--length", "512")


@dataclass(frozen=True)
class Row:
    """One row: a scheme, what is done for it, and how."""

    scheme: str
    method: str
    quantizer: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.scheme} | {self.method} | {self.quantizer}"


SCHEMES: dict[str, tuple[str, ...]] = {
    "W4A8": ("--scheme", "W4A8", "--activation", "per_token"),
    "W4A4": ("--scheme", "W4A4"),
    "W4A4 g64": ("--scheme", "W4A4", "--activation", "per_token_group"),
    "W8A8": ("--scheme", "W8A8"),
    "FP8": ("--scheme", "FP8_DYNAMIC"),
}
METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "rotate": ("--rotate",),
    "hadamard": ("--transform", "hadamard"),
    "smooth": ("--smooth", "0.5"),
    "quad 8": ("--transform", "quad", "--rank", "8"),
    "rotate + quad 8": ("--rotate", "--transform", "quad", "--rank", "8"),
    "quad 16": ("--transform", "quad", "--rank", "16"),
    "quad 64": ("--transform", "quad", "--rank", "64"),
}
QUANTIZERS: dict[str, tuple[str, ...]] = {
    "rtn": ("--quantizer", "rtn"),
    "gptq": (),
    "gptq + low rank 16": ("--low-rank", "16"),
}


def rows(schemes: list[str], methods: list[str], quantizers: list[str]) -> list[Row]:
    return [
        Row(s, m, q, (*SCHEMES[s], *METHODS[m], *QUANTIZERS[q])) for s in schemes for m in methods for q in quantizers
    ]


def run(row: Row, model: Path, calibration: tuple[str, ...], scoring: tuple[str, ...], work: Path) -> dict[str, Any]:
    """Quantize and score one row."""
    checkpoint, report = work / "checkpoint", work / "report.json"
    shutil.rmtree(checkpoint, ignore_errors=True)
    report.unlink(missing_ok=True)
    started = time.monotonic()
    # The head stays in float: the rows are about the blocks.
    command = [QTOOL, "quantize", str(model), "-o", str(checkpoint), *row.options, "--lm-head", "float", *calibration]
    made = json.loads(subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout)
    seconds = time.monotonic() - started
    command = [QTOOL, "evaluate", str(checkpoint), "--reference", str(model), "-o", str(report), *scoring, *SCORED]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    scored = json.loads(report.read_text())
    return {"made": made, "scored": scored, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="score on its second half, calibrate on its first")
    parser.add_argument("--work", type=Path, default=ROOT / ".demo" / "accuracy")
    parser.add_argument("--output", type=Path, help="the rows, as JSON lines")
    parser.add_argument("--calibration", choices=("in domain", "built-in"), default="in domain")
    parser.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quantizer", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = fetch(ROOT / ".demo")
    calibration: tuple[str, ...] = ("--sequences", str(options.sequences))
    scoring: tuple[str, ...] = ()
    if options.text is not None:
        text = options.text.read_text(encoding="utf-8")
        half = text.index("\n", len(text) // 2)
        first, second = options.work / "first-half.txt", options.work / "second-half.txt"
        first.write_text(text[:half], encoding="utf-8")
        second.write_text(text[half:], encoding="utf-8")
        scoring = ("--text", str(second))
        if options.calibration == "in domain":
            calibration += ("--text", str(first))
    done: set[str] = set()
    if options.output and options.output.exists():
        done = {json.loads(line)["row"] for line in options.output.read_text().splitlines()}
    for row in rows(options.scheme, options.method, options.quantizer):
        name = f"{row.name} | {options.calibration}"
        if name in done:
            continue
        result = run(row, model, calibration, scoring, options.work)
        reference = result["scored"]["reference"]
        entry = {
            "row": name,
            "perplexity": result["scored"]["perplexity"],
            "float_perplexity": reference["perplexity"],
            "ratio": result["scored"]["perplexity"] / reference["perplexity"],
            "kl_nats": reference["kl_nats"],
            "top1_agreement": reference["top1_agreement"],
            "bits_per_weight_quantized": result["made"]["bits_per_weight_quantized"],
            "quantize_seconds": round(result["seconds"], 1),
        }
        print(
            f"{name:55s} {entry['perplexity']:8.3f} × {entry['ratio']:.3f}  KL {entry['kl_nats']:.4f}  "
            f"{entry['bits_per_weight_quantized']:.2f} bits",
            flush=True,
        )
        if options.output:
            with options.output.open("a") as handle:
                handle.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
