"""Options that several commands share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from qtool.errors import UsageError

PATH = click.Path(path_type=Path)

output = click.option("-o", "--output", type=PATH, required=True, help="Where to write; must not exist.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
domain = click.option(
    "--domain",
    "domains",
    metavar="NAME=FILE",
    multiple=True,
    help="A UTF-8 text file as a domain of its own; may be repeated.  [default: the built-in domains]",
)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


threads = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=_cores,
    show_default="all cores",
    help="CPU threads; the same number gives the same bytes.",
)


Command = Callable[..., None]


def as_one(argument: str, kind: Any, *choices: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Options that a command takes together as one argument.

    Args:
        argument: its name.
        kind: a dataclass; its fields are called like the options' parameters.
        choices: `click.option`s, in the order in which --help lists them.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_choice(**given: Any) -> None:
            chosen = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            command(**{argument: chosen}, **given)

        wrapped: Command = with_choice
        for option in reversed(choices):
            wrapped = option(wrapped)
        return wrapped

    return decorate


@dataclass(frozen=True, kw_only=True)
class CorpusChoice:
    """Which tokens a command was asked to read; neither text nor dataset means the built-in corpus."""

    text: Path | None
    dataset: str | None
    sequences: int
    length: int


RUNTIMES = ("onnxruntime", "reference", "native")


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """What runs a model: one of RUNTIMES, None for the usual one; the native runtime's device.

    Raises:
        UsageError: for a device that nothing asks for.
    """

    runtime: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.device is not None and not self.native:
            raise UsageError("--device", "only the native runtime has a choice of devices", "add --runtime native")

    @property
    def native(self) -> bool:
        """Whether it is the native runtime."""
        return self.runtime == "native"


engine = as_one(
    "engine",
    EngineChoice,
    click.option(
        "--runtime",
        type=click.Choice(RUNTIMES),
        help="What runs it; native is ours, for checkpoints and models.  "
        "[default: onnxruntime for a package, else reference]",
    ),
    click.option(
        "--device", metavar="cpu|cuda", help="Of the native runtime; on cpu it runs its references.  [default: cuda]"
    ),
)


def corpus(*, sequences: int, purpose: str) -> Callable[[Command], Command]:
    """--text, --dataset, --sequences and --length, handed to the command as one argument `corpus`."""
    return as_one(
        "corpus",
        CorpusChoice,
        click.option("--text", type=PATH, help=f"A UTF-8 text file to {purpose} on."),
        click.option("--dataset", metavar="OWNER/NAME", help=f"A hub data set to {purpose} on."),
        click.option(
            "--sequences",
            type=click.IntRange(1, 1_000_000),
            default=sequences,
            show_default=True,
            help="How many sequences of the text.",
        ),
        click.option(
            "--length", type=click.IntRange(8, 1_048_576), default=512, show_default=True, help="Tokens in a sequence."
        ),
    )
