"""Peers on the model and text of transforms.py: what torchao, AutoRound and llm-compressor make of the same weights.

`python bench/accuracy/peers.py --text FILE --output ROWS` gives every peer an environment of its own under --work on
first use, the same float weights (read from the GGUF file), the same calibration ids (first half of the text,
32 × 512) and the same scored ids (second half, 16 × 512). The quantized model runs in the peer's own eager modules in
float32 on CPU, and its logits are scored here against the same float logits as qtool's rows. Rows are appended as
they come, rows that are there already are not run again, and a peer that cannot be installed or run has a row with
the reason as "error".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
sys.path.insert(0, str(Path(__file__).parent))

from cpu import write_hf_folder
from recorded import Recorded
from transforms import LENGTH, ROOT, SCORED, halves

from qtool.quantize.inputs import open_model, tokenize
from qtool.runtime.evaluate import evaluate
from qtool.runtime.reference import ReferenceSession
from smollm2 import fetch

WORKER = Path(__file__).parent / "peer_worker.py"
CALIBRATION = 32
SYMMETRIC = "weights symmetric, groups of 64"
TOKENS = "INT8 activations per token, dynamic"
ROWS = "INT8 weights symmetric per row"
STEPS = "32 × 512 in domain; {} steps of 2 sequences per block (its default: 200 of 8), no torch.compile, no amp"
GPTQ = "GPTQ with its defaults; 32 × 512 in domain"
# name: the package, and what was asked of it. The head is in float everywhere.
PEERS: dict[str, tuple[str, str]] = {
    "float": ("torchao", "float32, the control"),
    "torchao W4A16": ("torchao", f"IntxWeightOnlyConfig(int4), {SYMMETRIC}; no calibration"),
    "torchao W4A16 HQQ": ("torchao", f"IntxWeightOnlyConfig(int4, HQQ_SCALE_ONLY), {SYMMETRIC}; no calibration"),
    "torchao W4A8": ("torchao", f"Int8DynamicActivationIntxWeightConfig(int4), {SYMMETRIC}, asymmetric {TOKENS}"),
    "torchao W8A8": ("torchao", f"Int8DynamicActivationInt8WeightConfig(), {ROWS}, {TOKENS}"),
    "torchao W4A16 tinygemm": ("torchao", "Int4WeightOnlyConfig(group_size=64), bfloat16"),
    "torchao W4A16 tinygemm, CPU packing": ("torchao", "PrototypeInt4WeightOnlyConfig(64), bfloat16"),
    "auto-round W4A16": ("auto-round", f"{SYMMETRIC}; {STEPS}"),
    "auto-round W4A8": ("auto-round", f"{SYMMETRIC}, {TOKENS}; {STEPS}"),
    "auto-round W8A8": ("auto-round", f"scheme INT8: {ROWS}, {TOKENS}; {STEPS}"),
    "llm-compressor GPTQ W4A16": ("llmcompressor", f"{SYMMETRIC}; {GPTQ}"),
    "llm-compressor GPTQ W4A8": ("llmcompressor", f"{SYMMETRIC}, {TOKENS}; {GPTQ}"),
    "llm-compressor GPTQ W8A8": ("llmcompressor", f"scheme W8A8: {ROWS}, {TOKENS}; {GPTQ}"),
    "llm-compressor GPTQ SmoothQuant + W8A8": ("llmcompressor", f"SmoothQuant 0.8, then scheme W8A8; {GPTQ}"),
}


class Failed(Exception):
    """A peer that cannot be installed or run, with the end of what it said."""


def run(command: list[str], environment: dict[str, str], seconds: float, log: Path) -> None:
    """Run to the end, or raise `Failed` with the last lines it printed."""
    with log.open("w") as handle:
        try:
            code = subprocess.run(
                command, env=environment, stdout=handle, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {seconds:.0f} s") from None
    if code != 0:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "ERROR" in line] or lines
        raise Failed(f"exit code {code}: " + " / ".join(line[:300] for line in errors[-2:]))


def environment_of(package: str, work: Path) -> Path:
    """The interpreter of the environment that holds one peer, made on first use."""
    folder = work / "environments" / package
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {package} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        # torch first and by itself: the build that qtool runs on, where the peer allows it
        torch = "torch==" + version("torch").split("+")[0]
        run([*pip, torch], dict(os.environ), 1800, work / "pip.log")
        run([*pip, package, "transformers", "accelerate"], dict(os.environ), 1800, work / "pip.log")
        done.touch()
    return python


def version_of(package: str, python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def row_of(name: str, scored: Any, reference: Recorded, options: argparse.Namespace) -> dict[str, Any]:
    """Install, quantize and score one peer."""
    package, settings = PEERS[name]
    work = options.work
    row: dict[str, Any] = {"row": name, "package": package, "settings": settings.format(options.steps)}
    # no peer may fetch a data set or a model by itself, and none looks for an accelerator
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    threads = {key: str(options.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        python = environment_of(package, work)
        row["version"] = version_of(package, python)
        command = [str(python), str(WORKER), name, str(work), str(options.threads), str(options.steps)]
        run(command, os.environ | offline | threads, options.limit, work / f"{name.replace(' ', '-')}.log")
    except Failed as failure:
        return {**row, "error": str(failure)}
    facts = json.loads((work / "facts.json").read_text())
    result = evaluate(Recorded(scored, np.load(work / "logits.npy", mmap_mode="r"), name), scored, reference=reference)
    (work / "logits.npy").unlink()
    assert result.reference_perplexity is not None
    return {
        **row,
        "perplexity": result.perplexity,
        "float_perplexity": result.reference_perplexity,
        "ratio": result.perplexity / result.reference_perplexity,
        "kl_nats": result.kl_nats,
        "top1_agreement": result.top1_agreement,
        **facts,
        "threads": options.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="score on its second half, calibrate on its first")
    parser.add_argument("--output", type=Path, required=True, help="the rows, as JSON lines")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--work", type=Path, default=ROOT / ".demo" / "peers", help="environments and files are here")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=10, help="AutoRound's steps; hours for its default of 200")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that one row may take")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    done: set[str] = set()
    if options.output.exists():
        done = {json.loads(line)["row"] for line in options.output.read_text().splitlines()}
    model = fetch(ROOT / ".demo")
    source: Any = open_model(str(model))
    if not (options.work / "model" / "model.safetensors").exists():
        write_hf_folder(model, options.work / "model")
    in_domain, scoring = halves(options.text)
    size = {"length": LENGTH, "vocab_size": int(source.config["vocab_size"])}
    calibration = tokenize(source.tokenizer_files, in_domain, sequences=CALIBRATION, **size).ids
    scored = tokenize(source.tokenizer_files, scoring, sequences=SCORED, **size).ids
    np.save(options.work / "calibration.npy", calibration)
    np.save(options.work / "scored.npy", scored)
    with ReferenceSession(source) as session:
        reference = Recorded.of(session, scored)
    for name in options.peer:
        if name in done:
            continue
        row = row_of(name, scored, reference, options)
        shown = row.get("error") or (
            f"{row['perplexity']:8.3f} × {row['ratio']:.3f}  KL {row['kl_nats']:.4f}  "
            f"top-1 {row['top1_agreement']:.3f}  {row['bits_per_weight_quantized']:.2f} bits  {row['seconds']:.0f} s"
        )
        print(f"{name:40s} {shown}", flush=True)
        with options.output.open("a") as handle:
            handle.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
