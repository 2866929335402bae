"""qtool run: text from a package, streamed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from qtool.cli import options

EPILOG = """\b
Examples:
  qtool run package --prompt "The capital of France is"
  qtool run package --prompt "Once upon a time" --temperature 0.8 --seed 1 --max-new-tokens 200
  echo "Water boils at" | qtool run package --prompt -
"""


@click.command("run", epilog=EPILOG)
@click.argument("package", type=options.PATH)
@click.option("--prompt", required=True, help="The text to continue; - reads standard input.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=50, show_default=True, help="0 keeps all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For sampling.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check every byte first.")
@options.threads
@options.as_json
def command(
    package: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    verify: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Generate text with PACKAGE in ONNX Runtime, streamed to standard output; speed goes to standard error."""
    from qtool.cli.progress import err
    from qtool.errors import UsageError
    from qtool.quantize.artifacts.store import open_artifact
    from qtool.runtime.generate import generate
    from qtool.runtime.ort import OrtSession
    from qtool.runtime.tokenizer import PackageTokenizer

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("--prompt", "is empty", "give some text to continue")
    open_artifact(package, kind="package", verify=verify)
    tokenizer = PackageTokenizer(package)
    ids = tokenizer.encode(text)
    with OrtSession(package, threads=threads, max_length=len(ids) + max_new_tokens) as session:
        stream = tokenizer.stream()
        pieces: list[str] = []
        started = time.perf_counter()
        times: list[float] = []
        for token in generate(
            session,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_ids=tokenizer.eos_ids,
        ):
            times.append(time.perf_counter() - started)
            piece = stream(token)
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
    decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    prefill = len(ids) / times[0] if times else None
    if as_json:
        speed = {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
        click.echo(json.dumps({"prompt": text, "text": "".join(pieces), "tokens": len(times), **speed}, indent=2))
        return
    click.echo()
    if prefill and decode:
        err.print(f"{len(ids)} prompt tokens at {prefill:.0f}/s, {len(times)} new tokens at {decode:.0f}/s")
