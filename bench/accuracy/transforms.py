"""What each method is worth: perplexity, KL and top-1 of SmolLM2-135M-Instruct by scheme × method × quantizer.

`python bench/accuracy/transforms.py --text FILE` scores on the second half of a text, calibrated on the first half ("in
domain") or, with --calibration built-in, on the built-in corpus; without --text both halves are the built-in ones. Rows
are appended to the output as they come, and rows that are there already are not run again. What ONNX Runtime computes
is exported and scored there too. --planted runs the rows on the same model with planted outliers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from planted import planted
from recorded import Recorded
from rows import EXPORTED, METHODS, QUANTIZERS, SCHEMES, Row, rows

import qtool
from qtool.cli.planning import Planner
from qtool.cli.quantized import quantized
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.export.onnx import export_package
from qtool.quantize.inputs import Tokens, builtin_text, open_model, tokenize
from qtool.quantize.planner.budget import Budget
from qtool.runtime.evaluate import evaluate
from qtool.runtime.ort import OrtSession
from qtool.runtime.reference import ReferenceSession
from smollm2 import fetch

ROOT = Path(__file__).parents[2]
SCORED, SEQUENCES, LENGTH = 16, 32, 512


def run(
    row: Row,
    source: Any,
    tokenizer: Any,
    calibration: Tokens,
    scored: Any,
    reference: Recorded,
    planner_for: Callable[[Row], Planner],
) -> dict[str, Any]:
    """Quantize and score one row."""
    started = time.monotonic()
    recipe: Recipe = row.recipe
    steps: list[Any] = []
    if row.max_bits is not None:
        plan = planner_for(row).plan(Budget(max_bits=row.max_bits))
        recipe, steps = plan.recipe, plan.to_json()["steps"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, report = quantized(source, recipe, calibration, Path(folder) / "checkpoint", title=row.name)
        seconds = time.monotonic() - started
        with ReferenceSession(checkpoint) as session:
            result = evaluate(session, scored, reference=reference)
        package = {}
        if row.scheme in EXPORTED:
            package = in_package(checkpoint, tokenizer, Path(folder) / "package", scored, reference)
    assert result.reference_perplexity is not None
    return {
        "perplexity": result.perplexity,
        "float_perplexity": result.reference_perplexity,
        "ratio": result.perplexity / result.reference_perplexity,
        "kl_nats": result.kl_nats,
        "top1_agreement": result.top1_agreement,
        "bits_per_weight_quantized": report.bits_per_weight_quantized,
        "seconds": round(seconds, 1),
        **package,
        **({"distilled": asdict(report.distilled)} if report.distilled else {}),
        **({"steps": steps} if steps else {}),
    }


def in_package(
    checkpoint: QuantizedCheckpoint, tokenizer: Any, folder: Path, scored: Any, reference: Recorded
) -> dict[str, float]:
    """Export the checkpoint and score the package in ONNX Runtime."""
    folder.mkdir()
    details = export_package(
        checkpoint, folder, tokenizer_files=tokenizer, recipe_yaml=None, progress=lambda done, total, name: None
    )
    with OrtSession(folder, max_length=LENGTH) as session:
        result = evaluate(session, scored, reference=reference)
    assert result.kl_nats is not None
    return {
        "package_perplexity": result.perplexity,
        "package_kl_nats": result.kl_nats,
        "package_bits_per_weight_quantized": details["bits_per_weight_quantized"],
    }


def halves(text: Path | None) -> tuple[str, str]:
    """Calibration text in domain and scoring text."""
    if text is None:
        return builtin_text("calibration"), builtin_text("scoring")
    whole = text.read_text(encoding="utf-8")
    half = whole.index("\n", len(whole) // 2)
    return whole[:half], whole[half:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="score on its second half, calibrate on its first")
    parser.add_argument("--output", type=Path, required=True, help="the rows, as JSON lines")
    parser.add_argument("--calibration", choices=("in domain", "built-in"), default="in domain")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of 512 tokens, to calibrate")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quantizer", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--planted", action="store_true", help="the model with planted outliers")
    options = parser.parse_args()
    source: Any = open_model(str(fetch(ROOT / ".demo")))
    in_domain, scoring = halves(options.text)
    text = in_domain if options.calibration == "in domain" else builtin_text("calibration")
    size = {"length": LENGTH, "vocab_size": int(source.config["vocab_size"])}
    calibration = tokenize(source.tokenizer_files, text, sequences=options.sequences, **size)
    scored = tokenize(source.tokenizer_files, scoring, sequences=SCORED, **size).ids
    with ReferenceSession(source) as session:
        reference = Recorded.of(session, scored)
    subject = planted(source) if options.planted else source
    done: set[str] = set()
    if options.output.exists():
        done = {json.loads(line)["row"] for line in options.output.read_text().splitlines()}

    size_note = "" if options.sequences == SEQUENCES else f" | {options.sequences} sequences"
    planners: dict[tuple[str, bool], Planner] = {}

    def planner_for(row: Row) -> Planner:
        """One at a time: two budgets of one recipe come one after the other."""
        asked = (row.recipe.digest, row.mixed)
        if asked not in planners:
            planners.clear()
            threads = torch.get_num_threads()
            planners[asked] = Planner(subject, row.recipe, calibration, mixed=row.mixed, threads=threads)
        return planners[asked]

    for row in rows(options.scheme, options.method, options.quantizer):
        name = f"{row.name} | {options.calibration}{size_note}" + (" | planted" if options.planted else "")
        if name in done:
            continue
        entry = {"row": name, **run(row, subject, source.tokenizer_files, calibration, scored, reference, planner_for)}
        entry |= {"qtool": qtool.__version__, "torch": torch.__version__, "calibration_sequences": options.sequences}
        print(
            f"{name:70s} {entry['perplexity']:8.3f} × {entry['ratio']:.3f}  KL {entry['kl_nats']:.4f}  "
            f"{entry['bits_per_weight_quantized']:.2f} bits  {entry['seconds']:.0f} s",
            flush=True,
        )
        with options.output.open("a") as handle:
            handle.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
