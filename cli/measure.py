"""qtool measure: a model and a text to statistics."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qtool.cli import options

EPILOG = """\b
Examples:
  qtool measure ./model -o stats
  qtool measure model.gguf -o stats --text corpus.txt --sequences 64
"""


@click.command("measure", epilog=EPILOG)
@click.argument("model")
@options.output
@options.corpus(sequences=16, purpose="measure")
@options.threads
@options.as_json
def command(
    model: str,
    output: Path,
    corpus: options.CorpusChoice,
    threads: int,
    as_json: bool,
) -> None:
    """Record per layer and site what MODEL's activations look like, and write a statistics artifact.

    Maxima, per-channel maxima, the largest values with their token and channel, kurtosis, and the ratio of a
    token's maximum to its median.
    """
    from qtool.cli.corpus import load_tokens
    from qtool.cli.progress import notes, out, progress
    from qtool.quantize.architectures import architecture_of
    from qtool.quantize.artifacts.store import check_output, stage
    from qtool.quantize.inputs import open_model, token_texts

    check_output(output)
    source = open_model(model)
    notes(source.notes)
    tokens = load_tokens("calibration", source.tokenizer_files, corpus, vocab_size=source.config["vocab_size"])

    import torch

    from qtool.cli.report import print_statistics, statistics_rows
    from qtool.quantize.artifacts.manifest import Manifest, Parent
    from qtool.quantize.measure import measure

    torch.set_num_threads(threads)
    groups = architecture_of(source.config).linear_groups
    with progress("measure") as report_progress:
        statistics = measure(source, tokens.ids, groups=groups, progress=report_progress)
    texts = token_texts(source.tokenizer_files, (top.token for site in statistics.sites.values() for top in site.top))
    with stage(output) as staging:
        statistics.save(staging.path)
        manifest = staging.commit(
            Manifest(
                kind="statistics",
                parents=(Parent(kind="model", digest=source.digest), Parent(kind="text", digest=tokens.text_sha256)),
                details={
                    "tokens": list(tokens.ids.shape),
                    "threads": threads,
                    "token_texts": {str(i): text for i, text in texts.items()},
                },
            )
        )
    if as_json:
        rows = statistics_rows(statistics, texts)
        click.echo(json.dumps({"output": str(output), "digest": manifest.digest, "sites": rows}, indent=2))
        return
    print_statistics(statistics, texts)
    out.print(f"wrote {output}  sha256 {manifest.digest[:16]}", markup=False)
