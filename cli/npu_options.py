"""Options of `qtool export --target npu` (two of them tensorrt's too), handed to the command as one argument `npu`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qtool.cli import options
from qtool.errors import UsageError

# What targets other than npu read of these.
READ_BY = {"tensorrt": ("chunk", "context")}
OPTION_NAMES = {"islands": "island", "largest_error": "max-island-error", "prefix": "prefix-token"}


@dataclass(frozen=True, kw_only=True)
class NpuChoice:
    """What was asked for; None or empty: not given."""

    chunk: int | None = None
    context: int | None = None
    activations: str | None = None
    islands: tuple[str, ...] = ()
    headroom: float | None = None
    norm: str | None = None
    largest_error: float | None = None
    cache: str | None = None
    prefix: tuple[int, ...] = ()
    statistics: Path | None = None
    text: Path | None = None
    sequences: int | None = None
    length: int | None = None

    def check(self, target: str) -> None:
        """Raises UsageError for an option that another target does not read."""
        read = READ_BY.get(target, ())
        given = [name for name, value in vars(self).items() if value not in (None, ()) and name not in read]
        if target != "npu" and given:
            name = OPTION_NAMES.get(given[0], given[0])
            others = [other for other, names in READ_BY.items() if given[0] in names and other != target]
            raise UsageError(
                f"--{name}", f"is no option of target {target}", f"add --target {' or '.join(['npu', *others])}"
            )


def npu_options(command: options.Command) -> options.Command:
    """The options themselves."""

    @functools.wraps(command)
    def checked(npu: NpuChoice, **given: Any) -> None:
        npu.check(str(given["target"]))
        command(npu=npu, **given)

    return options.as_one(
        "npu",
        NpuChoice,
        click.option(
            "--chunk",
            type=click.IntRange(2, 4096),
            help="npu: tokens of a prefill call; tensorrt: the most of them.  [default: 128; tensorrt: 512]",
        ),
        click.option(
            "--context",
            type=click.IntRange(4, 1_048_576),
            help="npu, tensorrt: tokens that the cache holds.  [default: 1024; tensorrt: 4096]",
        ),
        click.option(
            "--activations",
            type=click.Choice(["uint16", "uint8"]),
            help="npu: type of what the checkpoint leaves open; under uint8 norms, residuals, scores and logits stay "
            "in 16 bits.  [default: uint16]",
        ),
        click.option(
            "--island", "islands", multiple=True, metavar="PATTERN", help="npu: tensors that stay in 16 bits."
        ),
        click.option(
            "--headroom",
            type=click.FloatRange(0, 8),
            help="npu: share by which measured ranges of 16-bit tensors are widened.  [default: 0.3]",
        ),
        click.option(
            "--norm", type=click.Choice(["l2", "rms"]), help="npu: the operator of RMS norms.  [default: l2]"
        ),
        click.option(
            "--max-island-error",
            "largest_error",
            type=click.FloatRange(0, 100),
            help="npu: 8-bit nodes whose rounding exceeds this share of a tensor's rms get 16 bits.  [default: 0.05]",
        ),
        click.option(
            "--cache",
            type=click.Choice(["uint16", "uint8"]),
            help="npu: type of keys and values in the cache.  [default: the activations']",
        ),
        click.option(
            "--prefix-token",
            "prefix",
            type=click.IntRange(0),
            multiple=True,
            help="npu: a token id that stands before every text, its keys and values computed in float: the massive "
            "activations of a first token then widen no range. May be repeated.",
        ),
        click.option("--statistics", type=options.PATH, help="npu: of `qtool measure`: widen the ranges by them."),
        click.option("--text", type=options.PATH, help="npu: a UTF-8 text to calibrate activations on."),
        click.option("--sequences", type=click.IntRange(1, 1_000_000), help="npu: of that text.  [default: 16]"),
        click.option("--length", type=click.IntRange(8, 1_048_576), help="npu: tokens in each.  [default: 512]"),
    )(checked)
