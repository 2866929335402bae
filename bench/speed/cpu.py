"""Prefill and decode speed on CPU: qtool's packages beside llama.cpp's Q4_0 and the onnxruntime-genai builder's int4.

Same weights, same machine, engines asked in turn within each round; what is judged is the ratio of each round, so that
a machine that drifts drifts for all. Every engine computes the logits of a prompt's last token alone (the builder with
prune_lm_head). Beside the speed stand each engine's perplexity on one text, scored through the very file and runtime
that are timed, and its resident memory after the rounds and at its highest. Run it alone: `make bench`.

    python bench/speed/cpu.py --output bench/results/cpu-smollm2.json
    python bench/speed/cpu.py --llama .demo/llama/bin/python      # has llama-cpp-python, see llama_peer.py
    python bench/speed/cpu.py --shape 1b                          # random weights, where bandwidth matters; no text
    python bench/speed/cpu.py --shape tiny --prompt 32 --new 4 --rounds 1     # does it all work?
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from random_model import SHAPES, write_folder, write_gguf

from smollm2 import fetch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LLAMA, BUILDER = "llama.cpp Q4_0", "builder int4, block 32"
BUILDER_BLOCKS = (32, 64, 128)
# Against whom, phase, at least this ratio for the best of qtool's engines.
TARGETS = ((LLAMA, "prefill", 1.4), (LLAMA, "decode", 1.2), (BUILDER, "prefill", 1.15), (BUILDER, "decode", 1.15))
# Memory and perplexity of qtool's engines are to be at most this much of a peer's.
CEILINGS = (("resident_bytes", 1.2), ("perplexity", 1.0))
# What --prefill-memory is given in one row: of the INT8 weights of all linears.
PROMPT_SHARE = 0.915
OURS = "qtool"
# What qtool quantizes with, beside its defaults. Random weights are rounded: nothing is to be learnt from them.
CHECKPOINTS = {
    "W4A8": ("--scheme", "W4A8"),
    "W4A8-distilled": ("--scheme", "W4A8", "--distill", "1"),
    "W4A8-head-W4A8": ("--scheme", "W4A8", "--lm-head", "W4A8"),
    "W8A8": ("--scheme", "W8A8"),
}
SCORED = (4, 512)
Rounds = list[dict[str, tuple[float, float]]]


class Engine:
    """A worker process that answers one request at a time."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._line() != "ready":
            sys.exit(f"error: {command} did not get ready")

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the worker ended with code {self.process.wait()}")
        return line.strip()

    def ask(self, *request: object) -> list[float]:
        """The numbers of one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, request)) + "\n")
        self.process.stdin.flush()
        return [float(word) for word in self._line().split()]

    def speed(self, prompt: int, new: int) -> tuple[float, float]:
        """Tokens per second of prefill and decode."""
        prefill, decode = self.ask("speed", prompt, new)
        return prompt / prefill, new / decode

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(*command: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def qtool(*arguments: str) -> None:
    run(sys.executable, "-m", "qtool.cli", *arguments)


class Models:
    """The same weights in every engine's form, built where they are missing.

    Args:
        work: folder of this model.
        common: folder of the downloaded one.
        shape: of random weights; None for SmolLM2.
    """

    def __init__(self, work: Path, common: Path, shape: str | None) -> None:
        self._work, self._common, self._shape = work, common, shape
        work.mkdir(parents=True, exist_ok=True)

    def source(self) -> Path:
        """What qtool quantizes."""
        return fetch(self._common) if self._shape is None else self.folder()

    def folder(self) -> Path:
        """A Hugging Face folder, which is what the builder reads."""
        folder = self._work / "hf"
        if not folder.exists():
            if self._shape is None:
                write_hf_folder(fetch(self._common), folder)
            else:
                from qtool.quantize.inputs import open_model

                write_folder(self._shape, folder, open_model(str(fetch(self._common))).tokenizer_files)
        return folder

    def ours(self, name: str, kind: str, *export: str) -> Path:
        """A package of qtool, from one of CHECKPOINTS; random weights are not verified in torch's float32."""
        package, checkpoint = self._work / f"package-{name}", self._work / f"checkpoint-{kind}"
        if package.exists():
            return package
        chosen = () if self._shape is None else ("--quantizer", "rtn")
        if not checkpoint.exists():
            qtool("quantize", str(self.source()), "-o", str(checkpoint), *CHECKPOINTS[kind], *chosen)
        unverified = () if self._shape is None else ("--no-verify",)
        qtool("export", str(checkpoint), "-o", str(package), *export, *unverified)
        return package

    def builder(self, block: int) -> Path:
        """The builder's int4 model."""
        output = self._work / f"builder-int4-{block}-last-logits"
        if not output.exists():
            run(
                *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(self.folder())),
                *("-o", str(output), "-p", "int4", "-e", "cpu", "-c", str(self._work / "cache")),
                *("--extra_options", f"block_size={block}", "prune_lm_head=true"),
            )
        return output

    def gguf(self, python: str) -> Path:
        """llama.cpp's Q4_0 of the same weights."""
        output = self._work / "q4_0.gguf"
        if not output.exists():
            source = fetch(self._common)
            if self._shape is not None:
                source = self._work / "f16.gguf"
                write_gguf(self._shape, source)
            run(python, str(HERE / "llama_peer.py"), "quantize", str(source), str(output))
        return output


def write_hf_folder(model: Path, folder: Path) -> None:
    """A model as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    from qtool.quantize.inputs import open_model

    source = open_model(str(model))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**source.config, "torch_dtype": "float32"}))
    for name, data in source.tokenizer_files.items():
        (folder / name).write_bytes(data)
    tensors = {name: torch.from_numpy(source.read(name)) for name in source.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def open_engines(models: Models, options: argparse.Namespace) -> dict[str, Engine]:
    """Every engine, built first and opened then."""
    threads, worker = str(options.threads), (sys.executable, str(HERE / "worker.py"))
    commands: dict[str, tuple[str, ...]] = {}
    if options.llama:
        model = models.gguf(options.llama)
        commands[LLAMA] = (options.llama, str(HERE / "llama_peer.py"), "serve", str(model), threads)
    for block in BUILDER_BLOCKS:
        commands[f"builder int4, block {block}"] = (*worker, "genai", str(models.builder(block)), threads)
    package = str(models.ours("w4a8", "W4A8"))
    commands["qtool W4A8 in genai"] = (*worker, "genai", package, threads)
    commands["qtool W4A8"] = (*worker, "qtool", package, threads)
    both = ("--prefill", "w8a8", "--kv", "int8")
    hybrid = str(models.ours("hybrid", "W4A8", *both[:2]))
    commands["qtool, prompts W8A8"] = (*worker, "qtool", hybrid, threads)
    commands["qtool, + KV INT8"] = (*worker, "qtool", str(models.ours("hybrid-kv8", "W4A8", *both)), threads)
    if options.shape is None:
        better = str(models.ours("hybrid-kv8-distilled", "W4A8-distilled", *both))
        commands["qtool, + distilled"] = (*worker, "qtool", better, threads)
    limit = str(int(PROMPT_SHARE * (Path(hybrid) / "fill.onnx.data").stat().st_size))
    limited = str(models.ours("hybrid-kv8-limited", "W4A8", *both, "--prefill-memory", limit))
    commands["qtool, + limit of INT8 weights"] = (*worker, "qtool", limited, threads)
    lean = str(models.ours("hybrid-kv8-head4", "W4A8-head-W4A8", *both))
    commands["qtool, + head in 4 bits"] = (*worker, "qtool", lean, threads)
    pipeline = str(models.ours("hybrid-genai", "W4A8", *both[:2], "--prefill-for", "genai"))
    commands["qtool, prompts W8A8, in genai"] = (*worker, "genai", pipeline, threads)
    if options.w8a8:
        commands["qtool W8A8 per token"] = (*worker, "qtool", str(models.ours("w8a8", "W8A8")), threads)
    return {name: Engine(*command) for name, command in commands.items()}


def text_tokens(models: Models, work: Path, text: Path | None) -> Path:
    """Token ids of a text, as a file that the workers read."""
    import numpy as np

    from qtool.quantize.inputs import builtin_text, open_model, tokenize

    model = open_model(str(models.source()))
    words = builtin_text("scoring") if text is None else text.read_text()
    sequences, length = SCORED
    tokens = tokenize(
        model.tokenizer_files, words, sequences=sequences, length=length, vocab_size=model.config["vocab_size"]
    )
    path = work / "scored.npy"
    np.save(path, tokens.ids)
    return path


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".demo" / "bench", help="where models are built and kept")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of SmolLM2")
    parser.add_argument("--llama", help="interpreter of an environment with llama-cpp-python; without it no llama.cpp")
    parser.add_argument("--w8a8", action="store_true", help="also a package that is INT8 throughout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="prefill tokens")
    parser.add_argument("--new", type=int, default=64, help="decode tokens, after the prompt")
    parser.add_argument("--text", type=Path, help="what perplexity is taken on; default: qtool's own text")
    parser.add_argument("--no-score", action="store_true", help="no perplexity")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    work = options.work if options.shape is None else options.work / options.shape
    models = Models(work, options.work, options.shape)
    engines = open_engines(models, options)
    rounds: Rounds = []
    for number in range(options.rounds + 1):
        timed = {name: engine.speed(options.prompt, options.new) for name, engine in engines.items()}
        if number:  # the first round warms up
            rounds.append(timed)
            print(f"round {number}:", {name: f"{p:.0f} / {d:.0f}" for name, (p, d) in timed.items()}, flush=True)
    resident = {name: engine.ask("memory") for name, engine in engines.items()}
    losses = {}
    if not options.no_score and options.shape is None:
        tokens = text_tokens(models, work, options.text)
        losses = {name: engine.ask("score", tokens)[0] for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    report(rows_of(rounds, resident, losses), rounds, options)


def rows_of(rounds: Rounds, resident: dict[str, list[float]], losses: dict[str, float]) -> list[dict[str, Any]]:
    """One row an engine; ratios are medians of each round's own."""
    rows: list[dict[str, Any]] = []
    for name in rounds[0]:
        row: dict[str, Any] = {"engine": name}
        for index, phase in enumerate(("prefill", "decode")):
            row[f"{phase}_tokens_per_s"] = spread([r[name][index] for r in rounds])
            for peer in (LLAMA, BUILDER):
                if peer in rounds[0]:
                    ratios = [r[name][index] / r[peer][index] for r in rounds]
                    row.setdefault(f"{phase}_ratio", {})[peer] = spread(ratios)
        row["resident_bytes"], row["highest_bytes"] = (int(number) for number in resident[name])
        if name in losses:
            row["perplexity"] = math.exp(losses[name])
        rows.append(row)
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every engine of qtool and every target, what was reached."""
    return [
        {
            "engine": row["engine"],
            "peer": peer,
            "phase": phase,
            "target": wanted,
            "reached": row[f"{phase}_ratio"][peer]["median"],
            "met": row[f"{phase}_ratio"][peer]["median"] >= wanted,
        }
        for row in rows
        for peer, phase, wanted in TARGETS
        if row["engine"].startswith(OURS) and peer in row[f"{phase}_ratio"]
    ]


def ceilings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every engine of qtool and every peer, how much of the peer's memory and perplexity it has."""
    found = {row["engine"]: row for row in rows}
    return [
        {
            "engine": row["engine"],
            "peer": peer,
            "of": key,
            "target": most,
            "reached": row[key] / found[peer][key],
            "met": row[key] <= most * found[peer][key],
        }
        for row in rows
        for peer in (LLAMA, BUILDER)
        for key, most in CEILINGS
        if row["engine"].startswith(OURS) and peer in found and key in row
    ]


def report(rows: list[dict[str, Any]], rounds: Rounds, options: argparse.Namespace) -> None:
    print(f"\n{processor()}, {options.threads} threads, {len(rounds)} rounds, {options.prompt} + {options.new} tokens")
    peers = [peer for peer in (LLAMA, BUILDER) if peer in rounds[0]]
    heads = [f"{phase} / {peer}" for peer in peers for phase in ("prefill", "decode")]
    columns = f"{'':30}{'prefill':>9}{'decode':>8}" + "".join(f"{head:>34}" for head in heads)
    print(f"{columns}{'MB':>7}{'peak':>7}{'ppl':>9}")
    for row in rows:
        prefill, decode = (row[f"{phase}_tokens_per_s"]["median"] for phase in ("prefill", "decode"))
        line = f"{row['engine']:30}{prefill:9.0f}{decode:8.0f}"
        for peer in peers:
            for phase in ("prefill", "decode"):
                ratio = row[f"{phase}_ratio"][peer]
                line += f"{ratio['median']:18.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        perplexity = f"{row['perplexity']:9.3f}" if "perplexity" in row else f"{'':9}"
        print(f"{line}{row['resident_bytes'] / 1e6:7.0f}{row['highest_bytes'] / 1e6:7.0f}{perplexity}")
    reached = targets(rows)
    for target in reached:
        verdict = "met" if target["met"] else "MISSED"
        ratio = f"{target['reached']:.2f} of {target['target']:.2f}"
        print(f"{target['engine']:30} {target['phase']:8} against {target['peer']:24} {ratio}  {verdict}")
    most = ceilings(rows)
    for target in most:
        verdict = "met" if target["met"] else "MISSED"
        ratio = f"{target['reached']:.3f}, at most {target['target']:.2f}"
        print(f"{target['engine']:30} {target['of']:14} against {target['peer']:24} {ratio}  {verdict}")
    if options.output:
        packages = ("qtool-compiler", "onnxruntime", "onnxruntime-genai", "mobius-onnx", "numpy")
        data = {
            "machine": {"processor": processor(), "threads": options.threads, "python": platform.python_version()},
            "versions": {name: version(name) for name in packages} | llama_version(options.llama),
            "model": "SmolLM2-135M-Instruct" if options.shape is None else f"random weights, shape {options.shape}",
            "rounds": len(rounds),
            "prompt": options.prompt,
            "new": options.new,
            "logits": "last token only",
            "rows": rows,
            "targets": reached,
            "ceilings": most,
        }
        options.output.write_text(json.dumps(data, indent=2) + "\n")


def llama_version(python: str | None) -> dict[str, str]:
    if not python:
        return {}
    question = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    answer = subprocess.run([python, "-c", question], capture_output=True, text=True, check=True)
    return {"llama-cpp-python": answer.stdout.strip()}


if __name__ == "__main__":
    main()
