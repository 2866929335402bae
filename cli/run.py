"""qtool run: text from a package or a checkpoint, streamed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qtool.cli import options

if TYPE_CHECKING:
    from qtool.runtime.session import Session

EPILOG = """\b
Examples:
  qtool run package --prompt "The capital of France is"
  qtool run package --prompt "Once upon a time" --temperature 0.8 --seed 1 --max-new-tokens 200
  echo "Water boils at" | qtool run package --prompt -
  qtool run checkpoint --runtime native --device cuda --prompt "The capital of France is"
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
@options.engine
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
    engine: options.EngineChoice,
    threads: int,
    as_json: bool,
) -> None:
    """Generate text with PACKAGE, streamed to standard output; speed goes to standard error.

    A package runs in ONNX Runtime. With --runtime native PACKAGE is a checkpoint, run by our own runtime.
    """
    from qtool.cli.progress import err
    from qtool.errors import UsageError
    from qtool.runtime.generate import generate
    from qtool.runtime.tokenizer import Tokenizer

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("--prompt", "is empty", "give some text to continue")
    runner = _checkpoint_runner if engine.native else _package_runner
    runs = runner(package, engine, verify=verify, threads=threads)
    tokenizer = Tokenizer(runs.tokenizer)
    ids = tokenizer.encode(text)
    with runs.open_session(len(ids) + max_new_tokens) as session:
        clock = Clock()
        tokens = generate(
            session,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_ids=tokenizer.eos_ids or runs.eos_ids,
        )
        pieces: list[str] = []
        for piece in tokenizer.stream(clock.timed(tokens)):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
    if as_json:
        data = {"prompt": text, "text": "".join(pieces), "tokens": len(clock.times)}
        click.echo(json.dumps({**data, "decode_tokens_per_s": clock.decode_tokens_per_s}, indent=2))
        return
    click.echo()
    if (speed := clock.decode_tokens_per_s) is not None:
        err.print(f"{len(ids)} prompt tokens, {len(clock.times)} new tokens at {speed:.0f}/s")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Where the tokenizer is, what opens a session of so many tokens, and what ends a text where no tokenizer says."""

    tokenizer: Path
    open_session: Callable[[int], Session]
    eos_ids: frozenset[int] = frozenset()


def _package_runner(package: Path, engine: options.EngineChoice, *, verify: bool, threads: int) -> Runs:
    from qtool.cli.subject import package_session
    from qtool.errors import UsageError
    from qtool.quantize.artifacts.store import open_artifact

    if engine.runtime == "reference":
        raise UsageError("--runtime reference", "generates no text", "use --runtime native for a checkpoint")
    manifest = open_artifact(package, kind="package", verify=verify)
    session = package_session(manifest.details["target"])
    return Runs(tokenizer=package, open_session=lambda length: session(package, threads=threads, max_length=length))


def _checkpoint_runner(folder: Path, engine: options.EngineChoice, *, verify: bool, threads: int) -> Runs:
    from qtool.cli.subject import open_native
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
    from qtool.runtime.native import native_device

    native_device(engine.device or "cuda")
    source = QuantizedCheckpoint(folder, verify=verify)
    eos = source.config.get("eos_token_id")
    return Runs(
        tokenizer=folder / "tokenizer",
        open_session=lambda length: open_native(source, threads=threads, length=length, device=engine.device),
        eos_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


class Clock:
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def timed(self, tokens: Iterator[int]) -> Iterator[int]:
        """The same tokens, each noted."""
        for token in tokens:
            self.times.append(time.perf_counter())
            yield token

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed from the first new token to the last, or None when there are fewer than two."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None
