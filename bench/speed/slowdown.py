"""What online transforms and plans cost, counted and timed: does --max-slowdown keep its word?

A W4A8 package as asked for is timed beside the same one with a transform before every linear, and beside plans within a
limit; engines take turns within each round, and a ratio is one round's. "Counted" is what the planner goes by: reads of
a decoded and work of a prefilled token, of the blocks alone; what is timed is the whole model, and prefill computes the
logits of every token. Weights are rounded to nearest: codes do not change the time. Run it alone.

    python bench/speed/slowdown.py --output bench/results/slowdown-smollm2.json
    python bench/speed/slowdown.py --shape 1b --limits      # random weights; no plans, which take long at this size
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from cpu import processor
from random_model import SHAPES, write_folder

from qtool.quantize.architectures import require_quantizable
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.inputs import open_model
from qtool.quantize.planner.cost import NOTHING, Cost, cost_of
from qtool.quantize.quantizers.data_needs import block_prefix
from smollm2 import fetch

ROOT = Path(__file__).parents[2]
AS_ASKED = "as asked"
EVERYWHERE = {
    AS_ASKED: (),
    "Hadamard everywhere": ("--transform", "hadamard"),
    "QUAD 16 everywhere": ("--transform", "quad", "--rank", "16"),
}
COMMON = ("--scheme", "W4A8", "--quantizer", "rtn", "--sequences", "8", "--length", "256", "--threads", "1")


def qtool(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "qtool.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def package(model: Path, work: Path, name: str, options: tuple[str, ...]) -> tuple[Path, Cost]:
    """A package made with these options, and what the planner counts for its blocks; kept for the next time."""
    checkpoint, folder = work / f"{name} checkpoint", work / name
    if not checkpoint.exists():
        qtool("quantize", model, "-o", checkpoint, *COMMON, *options)
    if not folder.exists():
        qtool("export", checkpoint, "-o", folder, "--threads", "1")
    opened = QuantizedCheckpoint(checkpoint)
    sites = [
        [block_prefix(index) + path for path in group]
        for index in range(int(opened.config["num_hidden_layers"]))
        for group in require_quantizable(opened.config).linear_groups
    ]
    return folder, sum((cost_of({m: opened.quantized(m) for m in site}) for site in sites), NOTHING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".demo" / "slowdown", help="where models are built and kept"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of SmolLM2")
    parser.add_argument("--limits", type=float, nargs="*", default=[1.05, 1.2], help="plans' --max-slowdown")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    work = options.work / (options.shape or "smollm2")
    work.mkdir(parents=True, exist_ok=True)
    model = fetch(ROOT / ".demo")
    if options.shape is not None:
        files, model = open_model(str(model)).tokenizer_files, work / "model"
        if not model.exists():
            write_folder(options.shape, model, files)
    wanted = {**EVERYWHERE}
    for limit in options.limits:
        # The bits are left free: what is asked for is what the slowdown alone allows.
        wanted[f"plan, at most {limit:g}"] = ("--auto", "--max-bits", "8", "--max-slowdown", str(limit))
    made = {name: package(model, work, name, given) for name, given in wanted.items()}
    start = made[AS_ASKED][1]
    rows: list[dict[str, Any]] = [
        {
            "package": name,
            "counted": {"decode": cost.reads / start.reads, "prefill": cost.work / start.work},
            "bits_relative": cost.bits / start.bits,
            "timed": {},
        }
        for name, (_, cost) in made.items()
    ]
    size = ("--prompt", str(options.prompt), "--new", str(options.new), "--rounds", str(options.rounds))
    for threads in options.threads:
        folders = [folder for folder, _ in made.values()]
        timed = json.loads(qtool("bench", *folders, *size, "--threads", str(threads), "--json"))
        for row, found in zip(rows, timed["models"], strict=True):
            row["timed"][f"{threads} threads"] = {
                phase: {kind: 1 / ratio for kind, ratio in found[f"{phase}_ratio_to_first"].items()}
                for phase in ("decode", "prefill")
            }
    report(rows)
    if options.output is not None:
        machine = {"processor": processor(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("qtool-compiler", "onnxruntime")}
        about = {"machine": machine, "versions": versions, "model": options.shape or "SmolLM2-135M-Instruct"}
        about |= {"rounds": options.rounds, "prompt": options.prompt, "new": options.new}
        options.output.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def report(rows: list[dict[str, Any]]) -> None:
    """As Markdown: time relative to the package as asked, counted, then the median round and its range."""
    settings = list(rows[0]["timed"])
    print(f"| | decode counted | {' | '.join(settings)} | prefill counted | {' | '.join(settings)} |")
    print("|---|" + "---:|" * (2 + 2 * len(settings)))
    for row in rows:
        cells = [row["package"]]
        for phase in ("decode", "prefill"):
            cells.append(f"{row['counted'][phase]:.2f}")
            for setting in settings:
                spread = row["timed"][setting][phase]
                fast, slow = sorted((spread["low"], spread["high"]))
                cells.append(f"{spread['median']:.2f} ({fast:.2f}–{slow:.2f})")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
