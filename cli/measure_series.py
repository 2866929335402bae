"""qtool measure --series: massive activations over a model's training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli import options
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.quantize.measure.series import Series

EPILOG = """\b
Examples:
  qtool measure --series step1000 step2000 step4000 step8000 step16000 step32000 -o dynamics
  qtool measure --series a b c d e f --steps 1,2,4,8,16,32 -o dynamics
"""


@click.command("series", epilog=EPILOG)
@click.argument("models", nargs=-1, required=True)
@options.output
@click.option("--steps", help="The checkpoints' training steps, with commas.  [default: the last number in each name]")
@options.corpus(sequences=8, purpose="measure")
@options.threads
@options.as_json
def command(
    models: tuple[str, ...],
    output: Path,
    steps: str | None,
    corpus: options.CorpusChoice,
    threads: int,
    as_json: bool,
) -> None:
    """Follow max|h| / median|h| of every layer over the checkpoints MODELS, and fit each layer's five-parameter curve.

    f(t) = A exp(-λx) ln x + K with x = γt + t0 (arXiv 2508.03616). Writes dynamics.json and a figure.
    """
    numbers = _steps(models, steps)
    from qtool.cli.corpus import load_domains
    from qtool.cli.progress import notes, out, progress, table
    from qtool.quantize.artifacts.store import check_output, stage, write_file
    from qtool.quantize.inputs import open_model

    check_output(output)
    sources = [open_model(model) for model in models]
    first = sources[0]
    tokens = load_domains(first.tokenizer_files, corpus, vocab_size=first.config["vocab_size"])
    notes(tokens.notes)

    import torch

    from qtool.quantize.measure import Text
    from qtool.quantize.measure.report.figures.dynamics import dynamics_png
    from qtool.quantize.measure.series import measure_series

    torch.set_num_threads(threads)
    text = Text(ids=tokens.ids, domains=tokens.domains, domain_of=tokens.domain_of, sha256=tokens.text_sha256)
    with progress("measure") as report_progress:
        series = measure_series(sources, numbers, text, report_progress)
    data = _json(series)
    with stage(output) as staging:
        write_file(staging.path / "dynamics.json", (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())
        write_file(staging.path / "dynamics.png", dynamics_png(series.steps, series.layers, series.ratios, series.fits))
        staging.publish()
    if as_json:
        click.echo(json.dumps(data, indent=2, allow_nan=False))
        return
    cells = [
        [layer["layer"], f"{layer['ratios'][0]:.4g}", f"{layer['ratios'][-1]:.4g}"]
        + [f"{layer['fit'][name]:.4g}" for name in ("amplitude", "decay", "rate", "start", "offset", "r_squared")]
        + ["–" if layer["fit"]["peak_step"] is None else f"{layer['fit']['peak_step']:.0f}"]
        for layer in data["layers"]
    ]
    columns = ["layer", "first", "last", "A", "λ", "γ", "t0", "K", "R²", "peak step"]
    table(f"max|h| / median|h| over {len(data['steps'])} checkpoints", columns, cells)
    out.print(f"wrote {output}", markup=False)


def _steps(models: tuple[str, ...], steps: str | None) -> list[float]:
    """The training step of each checkpoint, given or read from its name."""
    if steps is not None:
        words = steps.split(",")
        if len(words) != len(models) or not all(word.strip().isdigit() for word in words):
            raise UsageError(f"--steps {steps}", f"is not {len(models)} whole numbers", "give one for each checkpoint")
        return [float(word) for word in words]
    found = [re.findall(r"\d+", Path(model).name) for model in models]
    for model, digits in zip(models, found, strict=True):
        if not digits:
            raise UsageError(model, "has no training step in its name", "give --steps")
    return [float(digits[-1]) for digits in found]


def _json(series: Series) -> dict[str, Any]:
    layers = zip(series.layers, series.ratios, series.fits, strict=True)
    return {
        "steps": series.steps.tolist(),
        "layers": [{"layer": name, "ratios": row.tolist(), "fit": vars(fit)} for name, row, fit in layers],
    }
