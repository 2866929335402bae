"""What quantizing a model will take, printed: size, peak memory and time from the config alone."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from qtool.cli.options import CorpusChoice

if TYPE_CHECKING:
    from qtool.quantize.artifacts.recipe import Recipe
    from qtool.quantize.inputs import SourceModel

MATRIX, ROUNDS = 1024, 5


def foretell(source: SourceModel, rules: Recipe, corpus: CorpusChoice, *, threads: int, as_json: bool) -> None:
    """Print the forecast for `qtool quantize` with this recipe; no weight is read."""
    import yaml

    from qtool.cli.progress import out
    from qtool.quantize.architectures import linear_names
    from qtool.quantize.planner.forecast import Calibration, forecast

    companions = {f"tokenizer/{name}": len(data) for name, data in source.tokenizer_files.items()}
    companions["recipe.yaml"] = len(yaml.safe_dump(rules.to_data(), sort_keys=False).encode())
    speed = matrix_speed(threads)
    found = forecast(
        source.config,
        rules.assign(linear_names(source.config)),
        dtype_of=source.stored_dtype,
        recipe=rules.to_data(),
        companions=companions,
        calibration=Calibration(sequences=corpus.sequences, length=corpus.length),
        operations_per_s=speed,
    )
    if as_json:
        data = {
            "size_bytes": found.size.whole,
            "weights_bytes": found.size.weights,
            "package_weights_bytes": found.package,
            "bits_per_weight": found.size.bits_per_weight,
            "peak_memory_bytes": found.memory.peak,
            "memory_bytes": dict(found.memory.parts),
            "seconds": found.seconds,
            "operations": found.operations,
            "operations_per_s": speed,
        }
        click.echo(json.dumps(data, indent=2))
        return
    parts = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in found.memory.parts.items())
    shape = f"{found.size.bits_per_weight:.2f} bits per parameter"
    out.print(f"checkpoint   {found.size.whole / 1e6:.1f} MB, {shape}", markup=False)
    if found.package is not None:
        out.print(f"package      {found.package / 1e6:.1f} MB of weights, exported to ONNX", markup=False)
    out.print(f"peak memory  {found.memory.peak / 1e6:.0f} MB: {parts}", markup=False)
    work = f"{found.operations / 1e12:.1f} T operations, {speed / 1e9:.0f} G a second in one matrix product"
    about = f"about {_about(found.seconds)}, within a factor of two"
    out.print(f"time         {about}: {work}, {threads} threads", markup=False)


def matrix_speed(threads: int) -> float:
    """Operations per second of a float32 product of two matrices [1024, 1024] here and now, the best of five."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.ones(MATRIX, MATRIX), torch.ones(MATRIX, MATRIX)
    torch.mm(a, b)
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * MATRIX**3 / best


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
