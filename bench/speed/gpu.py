"""Our kernels on this machine's GPU: correctness first, then every product, then a whole model's tokens a second.

    python bench/speed/gpu.py                         everything, the most valuable rows first, for 8 minutes
    python bench/speed/gpu.py --only products         without the models
    python bench/speed/gpu.py --tune --minutes 30     find tilings for this GPU and write kernels/*/configs.json
    python bench/speed/gpu.py --shape tiny --device cpu --no-checks
                                                      the same code on the references, in seconds (CI does it)

Weights are rotated through more memory than the cache has, calls are replayed as CUDA graphs, and everything that is
compared is timed in the same rounds. Rows go to bench/results/gpu-<name>.json. Exit codes: 1 when a result is wrong
(nothing is timed then, or the row says so), 4 when there is no GPU. Run it alone on the machine: `make gpu`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Kernels made under Triton's interpreter are not the ones to time; it is asked for when triton is imported.
    os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from rich.console import Console

from on_gpu import gemlite_peer, tune, tune_compile
from on_gpu.budget import Budget, Row, Work, run_in_order
from on_gpu.checks import check
from on_gpu.compile_ahead import OF_MODELS, compile_ahead
from on_gpu.contenders import BY_NAME, OURS, PEERS
from on_gpu.floors import Peaks, measure_peaks
from on_gpu.machine import machine, short_name, smi
from on_gpu.products import is_wrong, run_case
from on_gpu.random_model import SHAPES
from on_gpu.results import show, write
from on_gpu.row_kernels import run_rows
from on_gpu.shapes import GRIDS
from on_gpu.targets import verdicts
from on_gpu.timing import GraphTimer, Timer, timer_for
from on_gpu.tokens import VARIANTS, compare, run_variant
from on_gpu.transformers_peer import NAME, run_transformers
from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels.integer_gemm.tilings import target_of
from qtool.runtime.native.session import native_device

RESULTS = Path(__file__).parents[1] / "results"
PARTS = ("products", "rows", "tokens", "gemlite")
PARTS_OF = {"peer": "tokens"}  # estimated apart
CHECK_SECONDS = 240.0
COMPILE_SECONDS = 100.0
FIRST = 20  # products in front of the models: one token, 16, 64 and a prompt
WRONG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    started = time.monotonic()
    try:
        device = native_device(options.device)
        if options.tune and device.type != "cuda":
            raise UsageError("--tune", "times tilings, which only a GPU has", "give --device cuda")
        if device.type == "cuda":
            # An operation without a kernel is a row with a reason, not a reference's time.
            os.environ["QTOOL_BACKEND"] = "triton"
        return run(options, device, console, Budget(options.minutes * 60 - (time.monotonic() - started)))
    except (UsageError, EnvironmentFault) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return error.exit_code


def run(options: argparse.Namespace, device: torch.device, console: Console, budget: Budget) -> int:
    """Checks, then rows; the exit code."""
    facts = machine(device)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False, soft_wrap=True)
    if not options.no_checks and (failures := failed_checks(console)):
        return failures
    timer = timer_for(device)
    if options.tune:
        return tune_here(device, console, budget, facts)
    grid = GRIDS[options.shape]
    if device.type == "cuda":
        seconds = min(COMPILE_SECONDS, budget.left / 4)
        cases = grid.cases()
        done, asked = compile_ahead([*cases[:FIRST], *OF_MODELS, *cases[FIRST:]], seconds)
        console.print(f"{done} of {asked} products compiled ahead, {budget.left:.0f} s left")
    peaks, reasons = measure_peaks(device, timer)
    facts |= {"peaks": {**peaks.to_json(), **reasons}, "clocks_before": clocks(device)}
    console.print(f"measured peaks: {facts['peaks']}", markup=False)
    every = plan(options.shape, device, timer, peaks)
    works = [work for work in every if PARTS_OF.get(work.kind, work.kind) in options.only]
    path = options.output or RESULTS / f"gpu-{options.name or short_name(facts)}.json"
    known: list[Row] = []

    def said(work: Work, made: list[Row]) -> None:
        progress(console, budget, work, made)
        known.extend(made)
        write(path, facts, known, ["what comes after these: it was stopped"])

    rows, left_out = run_in_order(works, budget, said)
    compare(rows)
    rows += verdicts(rows) if options.shape != "tiny" else []
    facts["clocks_after"] = clocks(device)
    show(console, rows, left_out)
    write(path, facts, rows, left_out)
    console.print(f"{len(rows)} rows in {path}")
    wrong = [f"{row['name']} {row['k']}→{row['n']} M {row['m']}: {row['reason']}" for row in rows if is_wrong(row)]
    wrong += [f"{row['name']}: {row['reason']}" for row in rows if row["kind"] == "failed"]
    if wrong:
        console.print("wrong:\n  " + "\n  ".join(wrong), style="red", markup=False)
    return WRONG if wrong else 0


def plan(shape: str, device: torch.device, timer: Timer, peaks: Peaks) -> list[Work]:
    """All units: the first products, which targets speak of, then the models, then the rest."""
    works: list[Work] = []
    for place, case in enumerate(GRIDS[shape].cases()):
        value = place / 100 if place < FIRST else 10 + place
        contenders = (*OURS, *PEERS)
        run_one = partial(run_case, case, contenders, device, timer, peaks)
        works.append(Work(name=str(case), kind="products", value=value, seconds=3, run=run_one))
    m, k = (4096, 4096) if shape != "tiny" else (17, 256)
    works.append(
        Work(name="rows", kind="rows", value=0.5, seconds=8, run=partial(run_rows, m, k, device, timer, peaks))
    )
    seconds = 30.0 if shape != "tiny" else 5.0
    peer = partial(run_transformers, shape, device)
    works.append(Work(name=NAME, kind="peer", value=2, seconds=2 * seconds, run=peer))
    for variant in VARIANTS:
        # The five that were asked for before the shapes that no target names, the others behind those.
        value = 1 + variant.value if variant.value <= 5 else 60 + variant.value
        run_model = partial(run_variant, variant, shape, device)
        works.append(Work(name=variant.name, kind="tokens", value=value, seconds=seconds, run=run_model))
    if gemlite_peer.installed() and device.type == "cuda":
        beside = (*(BY_NAME[name] for name in ("w4a16 g128", "w8a8", "fp8", "torch bf16")), *gemlite_peer.PEERS)
        for place, case in enumerate(gemlite_peer.CASES):
            run_one = partial(run_case, case, beside, device, timer, peaks)
            works.append(
                Work(name=f"gemlite {case}", kind="gemlite", value=40 + place / 10, seconds=30, run=run_one)
            )
    return works


def failed_checks(console: Console) -> int:
    """The exit code of the tests on the GPU, 0 when they pass."""
    start = time.monotonic()
    checked = check(CHECK_SECONDS)
    for name, summary in checked.summaries.items():
        console.print(f"  {name}: {summary}", markup=False)
    if checked.failures:
        console.print("wrong on this GPU, so nothing is timed:", style="red")
        console.print("\n".join(checked.failures), markup=False)
        return WRONG
    console.print(f"correct on this GPU ({time.monotonic() - start:.0f} s)")
    return 0


def tune_here(device: torch.device, console: Console, budget: Budget, facts: dict[str, Any]) -> int:
    """Better tilings into kernels/*/configs.json."""
    target = target_of(device)
    if not target.startswith("sm_"):
        raise UsageError("--tune", f"cannot check candidates' machine code for {target}", "tune on an NVIDIA GPU")

    def said(work: Work, rows: list[Row]) -> None:
        for row in rows:
            if row["kind"] == "failed":
                console.print(f"{work.name} failed: {row['reason']}", style="red", markup=False)
                continue
            verdict = f"→ {row['chosen']}" if row["chosen"] else "stays"
            faster = f"best candidate {row['times']:.3f} × as fast, has to be {1 + row['margin']:.3f}"
            console.print(f"{work.name}: {faster}: {verdict}   ({budget.left:.0f} s left)", markup=False)

    with tune_compile.compilers() as pool:
        works = tune.works(device, target, GraphTimer(device, rounds=9), partial(tune_compile.refused_by, pool))
        rows, left_out = run_in_order(works, budget, said)
    write(RESULTS / f"gpu-{short_name(facts)}-tuning.json", facts, rows, left_out)
    changed = sum(bool(row.get("chosen")) for row in rows)
    console.print(f"{changed} of {len(rows)} tables' rows changed; left out: {', '.join(left_out) or 'nothing'}")
    console.print("next: `python -m qtool.kernels.compile_check --write` for the table of compiled kernels, then tests")
    return 0


def progress(console: Console, budget: Budget, work: Work, rows: list[Row]) -> None:
    failed = sum("reason" in row for row in rows)
    without = f", {failed} without a time" if failed else ""
    console.print(f"{work.name}: {len(rows)} rows{without}   ({budget.left:.0f} s left)", markup=False)


def clocks(device: torch.device) -> dict[str, str]:
    """Now, where nvidia-smi tells."""
    return smi(device.index or 0) if device.type == "cuda" else {}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=8.0, help="all of it, checks included (8)")
    made.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    made.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b", help="of products and of the model")
    made.add_argument("--device", default="cuda", help="cuda, cuda:1, …, or cpu for the references")
    made.add_argument("--tune", action="store_true", help="find tilings, write them, and stop")
    made.add_argument("--no-checks", action="store_true", help="without the tests in front")
    made.add_argument("--name", help="of the results' file: gpu-NAME.json")
    made.add_argument("--output", type=Path, help="another results' file")
    return made


if __name__ == "__main__":
    sys.exit(main())
