"""What measuring costs: `qtool measure` beside the plain forward pass of the same text, and whether it predicts.

Each pass is a process of its own, asked in turn: the time of a pass from opened file to last number (loading the
weights included in both), and the process's peak memory. The plain pass is transformers' whole network on the same
batches, logits included. Then the statistics' predictions are compared with the layers' measured output errors.
Run it alone: `make bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from smollm2 import fetch

ROOT = Path(__file__).parents[2]
LENGTH = 512


def read(model: Path, sequences: int) -> tuple[Any, Any]:
    """The opened model and the text."""
    from qtool.quantize.inputs import domain_texts, open_model, tokenize_domains
    from qtool.quantize.measure import Text

    source = open_model(str(model))
    tokens = tokenize_domains(source.tokenizer_files, domain_texts(), sequences=sequences, length=LENGTH)
    return source, Text(
        ids=tokens.ids, domains=tokens.domains, domain_of=tokens.domain_of, sha256=tokens.text_sha256
    )


def plain(source: Any, text: Any) -> None:
    """The forward pass alone."""
    import torch

    from qtool.quantize.artifacts.network import load_network
    from qtool.quantize.measure.batches import cut

    network = load_network(source)
    with torch.no_grad():
        for batch in cut(text.ids, text.domains, text.domain_of):
            network(torch.from_numpy(batch.tokens))


def measured(source: Any, text: Any) -> None:
    """The same with all statistics."""
    from qtool.quantize.measure import measure

    measure(source, text, progress=lambda *_: None)


WORKERS = {"plain": plain, "measure": measured}


def work(kind: str, model: Path, sequences: int, threads: int) -> None:
    """One pass; prints its seconds and the process's peak memory in bytes."""
    import torch
    import transformers  # noqa: F401  (not part of the time)

    torch.set_num_threads(threads)
    source, text = read(model, sequences)
    started = time.perf_counter()
    WORKERS[kind](source, text)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def ask(kind: str, model: Path, arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds and peak bytes of one pass in a fresh process."""
    command = [sys.executable, __file__, "--worker", kind, "--sequences", str(arguments.sequences)]
    command += ["--threads", str(arguments.threads), "--model", str(model)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def processor() -> str:
    """What the machine calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def predictions(model: Path, work_folder: Path, sequences: int) -> dict[str, float]:
    """Spearman of predicted and measured output errors, on text that the statistics have not seen."""
    qtool = [str(Path(sys.executable).parent / "qtool"), "measure"]
    stats = work_folder / "measure-statistics"
    subprocess.run(["rm", "-rf", str(stats)], check=True)
    subprocess.run([*qtool, str(model), "-o", str(stats), "--sequences", str(sequences)], check=True)
    done = subprocess.run([*qtool, "validate", str(model), str(stats), "--json"], check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)["spearman"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".demo", help="where models are kept")
    parser.add_argument("--model", type=Path, help="another model than SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="write the rows here as JSON")
    parser.add_argument("--no-predictions", action="store_true", help="time and memory only")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.model, arguments.sequences, arguments.threads)
        return
    model = arguments.model or fetch(arguments.work)
    ratios, seconds, peaks = [], {kind: [] for kind in WORKERS}, {kind: [] for kind in WORKERS}
    for number in range(arguments.rounds):
        for kind in WORKERS:
            took, peak = ask(kind, model, arguments)
            seconds[kind].append(took)
            peaks[kind].append(peak)
        ratios.append(seconds["measure"][-1] / seconds["plain"][-1])
        print(f"round {number + 1}: plain {seconds['plain'][-1]:.1f} s, measure × {ratios[-1]:.2f}", flush=True)
    result = {
        "model": model.name,
        "tokens": [arguments.sequences, LENGTH],
        "threads": arguments.threads,
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "seconds": {kind: spread(values) for kind, values in seconds.items()},
        "measure_over_plain": spread(ratios),
        "peak_bytes": {kind: max(values) for kind, values in peaks.items()},
        "spearman": {} if arguments.no_predictions else predictions(model, arguments.work, arguments.sequences),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
