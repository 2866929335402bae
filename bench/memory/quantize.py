"""What `qtool quantize` holds in memory, against what is promised of a model in the shape of Llama-3.2-1B:
600 MB + 2 × the largest block in float32 + the Hessians. 1 MB is 10⁶ bytes.

The weights are random, which changes no size. The largest block and Hessian are the same in every block, so that two
blocks show what sixteen do; the calibration text is short, because the promise does not speak of its hidden states,
which are counted here on a line of their own. "Hessians" are the largest Σ x xᵀ in float64 and one working copy of it,
the factor. The child's peak is the kernel's own (ru_maxrss): imports, libraries and file pages included.
Run it alone: `python bench/memory/quantize.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
MB = 1e6
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
ROWS_AT_ONCE = 4096
# What is run: name, whether the head is tied, and the options. The traps are a head of 1 GB in float32 and its codes.
CASES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "tied head W8A8, GPTQ": (True, ("--scheme", "W4A8")),
    "untied float head, GPTQ": (False, ("--scheme", "W4A16")),
    "untied head W8A8, rotated": (False, ("--scheme", "W4A8", "--rotate")),
    "tied head W8A8, RTN": (True, ("--scheme", "W4A8", "--quantizer", "rtn")),
    "QUAD 16": (True, ("--scheme", "W4A4", "--transform", "quad", "--rank", "16")),
    "Hadamard, frozen factors": (
        True,
        ("--scheme", "W4A4", "--transform", "hadamard", "--runtime-smooth", "frozen", "--smooth", "none"),
    ),
    "low rank 16": (True, ("--scheme", "W4A8", "--low-rank", "16")),
    "smooth": (True, ("--scheme", "W8A8", "--smooth", "0.5")),
    "searched smoothing": (True, ("--scheme", "W8A8", "--smooth", "aqas")),
    "tokens weighed, untied head": (False, ("--scheme", "W4A8", "--token-weights", "gradient")),
    "static": (True, ("--scheme", "W8A8", "--activation", "per_tensor", "--transform", "quad", "--rank", "16")),
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from qtool.quantize.architectures.shapes import tensor_shapes

    return tensor_shapes(config)


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A folder of random bfloat16 weights, one shard, written row by row so that this process stays small."""
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    header: dict[str, Any] = {}
    start = 0
    wanted = shapes(config)
    for name, shape in wanted.items():
        stop = start + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    generator = np.random.default_rng(0)
    with (partial / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for shape in wanted.values():
            width = prod(shape[1:])
            for first in range(0, shape[0], ROWS_AT_ONCE):
                rows = min(ROWS_AT_ONCE, shape[0] - first)
                if len(shape) == 1:
                    values = np.ones((rows, width), dtype=np.float32)
                else:
                    values = generator.standard_normal((rows, width), dtype=np.float32) / np.float32(width**0.5)
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    write_byte_tokenizer(partial)
    partial.rename(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def peak_of(command: list[str]) -> tuple[int, float]:
    """Peak memory in bytes and seconds of a child process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    return used.ru_maxrss * 1024, time.perf_counter() - started


def items(config: dict[str, Any], *, calibrated: bool, tokens: int) -> dict[str, int]:
    """The promise, part by part, in bytes."""
    block = 4 * sum(prod(shape) for name, shape in shapes(config).items() if name.startswith("model.layers.0."))
    widest = max(config["hidden_size"], config["intermediate_size"])
    return {
        "600 MB": int(600 * MB),
        "2 blocks": 2 * block,
        "Hessians": 2 * 8 * widest**2 if calibrated else 0,
        "hidden states": 4 * tokens * config["hidden_size"] if calibrated else 0,
    }


def kept(row: dict[str, Any]) -> bool:
    """Whether the promises hold: peak memory; its forecast within 30 %, and that of the size within 5 %."""
    memory = abs(row["foretold_bytes"] / row["peak_bytes"] - 1) <= 0.3
    size = abs(row["foretold_written_bytes"] / row["written_bytes"] - 1) <= 0.05
    return bool(row["peak_bytes"] <= row["allowed_bytes"] and memory and size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".demo", help="where models are kept")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, help="write the rows here as JSON")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    base, _ = peak_of([sys.executable, "-P", "-c", "import torch, transformers, qtool.quantize.quantizers"])
    print(f"imports alone: {base / MB:.0f} MB")
    rows = []
    for name in arguments.case or CASES:
        tied, options = CASES[name]
        config = {**CONFIG, "num_hidden_layers": arguments.blocks, "tie_word_embeddings": tied}
        kind = "tied" if tied else "untied"
        model = write_model(arguments.work / f"llama-1b-random-{arguments.blocks}-{kind}", config)
        output = arguments.work / "memory-checkpoint"
        shutil.rmtree(output, ignore_errors=True)
        qtool = [sys.executable, "-P", "-m", "qtool.cli"]
        shared = [*options, "--sequences", str(arguments.sequences), "--length", str(arguments.length)]
        shared += ["--threads", str(arguments.threads)]
        planned = [*qtool, "plan", str(model), "--dry-run", "--json", *shared]
        foretold = json.loads(subprocess.run(planned, check=True, stdout=subprocess.PIPE).stdout)
        peak, seconds = peak_of([*qtool, "quantize", str(model), "-o", str(output), *shared, "--restart"])
        written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        shutil.rmtree(output)
        parts = items(config, calibrated="rtn" not in options, tokens=arguments.sequences * arguments.length)
        allowed = sum(parts.values())
        rows.append(
            {"case": name, "peak_bytes": peak, "allowed_bytes": allowed, "parts_bytes": parts, "seconds": seconds,
             "written_bytes": written, "foretold_bytes": foretold["peak_memory_bytes"],
             "foretold_written_bytes": foretold["size_bytes"]}
        )  # fmt: skip
        shown = " + ".join(f"{part} {size / MB:.0f}" for part, size in parts.items() if size)
        print(f"{name}: {peak / MB:.0f} MB of {allowed / MB:.0f} ({shown}), {seconds:.0f} s", flush=True)
        print(f"  foretold {foretold['peak_memory_bytes'] / MB:.0f} MB, and {foretold['size_bytes'] / MB:.1f} of "
              f"{written / MB:.1f} MB on disk", flush=True)  # fmt: skip
    result = {
        "rows": rows,
        "imports_bytes": base,
        "blocks": arguments.blocks,
        "tokens": [arguments.sequences, arguments.length],
        "threads": arguments.threads,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in ("torch", "transformers", "numpy")},
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(not all(kept(row) for row in rows))


if __name__ == "__main__":
    main()
