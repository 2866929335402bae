"""Prefill and decode speed on CPU: qtool's package beside the onnxruntime-genai builder's int4 model.

Same checkpoint, same runtime, same machine, engines asked in turn within each round; what is printed and stored is
the ratio of each round, so that a machine that drifts drifts for both. The builder is there twice: as it comes
(block 32), and with qtool's block of 64, which is the like-for-like comparison. Run it alone: `make bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from smollm2 import fetch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEER = "builder int4, block 32"


class Engine:
    """A worker process that is asked for one timing at a time."""

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        command = [sys.executable, str(HERE / "worker.py"), kind, str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the worker ended with code {self.process.wait()}")
        return line.strip()

    def time(self, prompt: int, new: int) -> tuple[float, float]:
        """Tokens per second of prefill and decode."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{prompt} {new}\n")
        self.process.stdin.flush()
        prefill, decode = map(float, self._line().split())
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


def build_ours(work: Path) -> Path:
    """qtool's package: W4A8, GPTQ, all defaults."""
    if not (work / "package").exists():
        qtool("quantize", str(fetch(work)), "-o", str(work / "checkpoint"), "--scheme", "W4A8")
        qtool("export", str(work / "checkpoint"), "-o", str(work / "package"))
    return work / "package"


def build_theirs(work: Path, block: int) -> Path:
    """The builder's int4 model of the same weights."""
    folder, output = work / "hf", work / f"builder-int4-{block}"
    if not folder.exists():
        write_hf_folder(fetch(work), folder)
    if not output.exists():
        run(
            *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(folder), "-o", str(output)),
            *("-p", "int4", "-e", "cpu", "-c", str(work / "cache"), "--extra_options", f"block_size={block}"),
        )
    return output


def write_hf_folder(model: Path, folder: Path) -> None:
    """The model as a Hugging Face folder, which is what the builder reads."""
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


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".demo" / "bench", help="where models are built and kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="prefill tokens")
    parser.add_argument("--new", type=int, default=64, help="decode tokens, after the prompt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    ours = build_ours(options.work)
    engines = {
        PEER: Engine("genai", build_theirs(options.work, 32), options.threads),
        "builder int4, block 64": Engine("genai", build_theirs(options.work, 64), options.threads),
        "qtool package in genai": Engine("genai", ours, options.threads),
        "qtool package in qtool": Engine("qtool", ours, options.threads),
    }
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(options.rounds + 1):
        timed = {name: engine.time(options.prompt, options.new) for name, engine in engines.items()}
        if number:  # the first round warms up
            rounds.append(timed)
            print(f"round {number}:", {name: f"{p:.0f} / {d:.0f}" for name, (p, d) in timed.items()}, flush=True)
    for engine in engines.values():
        engine.close()
    report(rounds, options)


def report(rounds: list[dict[str, tuple[float, float]]], options: argparse.Namespace) -> None:
    rows = []
    print(f"\n{processor()}, {options.threads} threads, prompt {options.prompt}, {options.new} new tokens")
    print(f"{'':26}{'prefill tok/s':>16}{'decode tok/s':>16}{'prefill ratio':>24}{'decode ratio':>24}")
    for name in rounds[0]:
        prefill, decode = (spread([r[name][i] for r in rounds]) for i in (0, 1))
        ratios = [spread([r[name][i] / r[PEER][i] for r in rounds]) for i in (0, 1)]
        shown = [f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})" for r in ratios]
        print(f"{name:26}{prefill['median']:16.0f}{decode['median']:16.0f}{shown[0]:>24}{shown[1]:>24}")
        rows.append(
            {
                "engine": name,
                "prefill_tokens_per_s": prefill,
                "decode_tokens_per_s": decode,
                "prefill_ratio": ratios[0],
                "decode_ratio": ratios[1],
            }
        )
    if options.output:
        packages = ("qtool-compiler", "onnxruntime", "onnxruntime-genai", "mobius-onnx", "numpy")
        machine = {"processor": processor(), "threads": options.threads, "python": platform.python_version()}
        data = {
            "machine": machine,
            "versions": {name: version(name) for name in packages},
            "rounds": len(rounds),
            "prompt": options.prompt,
            "new": options.new,
            "baseline": PEER,
            "rows": rows,
        }
        options.output.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
