"""Options of `qtool export` that choose nodes' accuracy_level, handed to the command as one argument `levels`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from qtool.cli import options
from qtool.errors import UsageError

SCHEME, MEASURED = "scheme", "measured"
MAX_ADDED_ERROR = 0.1


@dataclass(frozen=True, kw_only=True)
class LevelChoice:
    """What was asked for.

    Attributes:
        source: SCHEME, MEASURED, or the path of a table.
        max_added_error, level_text: of MEASURED; None: not given.
    """

    source: str = SCHEME
    max_added_error: float | None = None
    level_text: Path | None = None

    @property
    def table(self) -> Path | None:
        """The table to take the levels from."""
        return None if self.source in (SCHEME, MEASURED) else Path(self.source)

    def check(self, *, other: bool, evaluation: bool) -> None:
        """Raises UsageError for options that do not go together.

        Args:
            other: no package for the CPU is made.
            evaluation: the card gets a report of the checkpoint as quantized.
        """
        given = self.max_added_error is not None or self.level_text is not None
        if given and self.source != MEASURED:
            why = "are for levels that are measured"
            raise UsageError("--max-added-error and --level-text", why, "add --accuracy-level measured")
        if other and self.source != SCHEME:
            remedy = "leave it out"
            raise UsageError(f"--accuracy-level {self.source}", "is of --target cpu --format onnx", remedy)
        if evaluation and self.source != SCHEME:
            why = "scored the checkpoint as it was quantized, which is not what this package computes"
            raise UsageError("--evaluation", why, "leave it out, and score the package: qtool evaluate PACKAGE")


level_options = options.as_one(
    "levels",
    LevelChoice,
    click.option(
        "--accuracy-level",
        "source",
        metavar="scheme|measured|FILE",
        default=SCHEME,
        show_default=True,
        help="Activations of linears that were quantized with 16-bit ones (W4A16, W8A16 in groups). scheme: as "
        "they are, accuracy_level 1. measured: INT8 per token and block (accuracy_level 4) node by node, where "
        "that is faster and adds little error. FILE: as the accuracy_levels.json of an earlier package says.",
    ),
    click.option(
        "--max-added-error",
        type=click.FloatRange(0, min_open=True),
        metavar="SHARE",
        help="measured: the most that INT8 activations may add to a node's squared output error, as a share of "
        f"what rounding its weights did.  [default: {MAX_ADDED_ERROR}, which moves the error itself by 5 %]",
    ),
    click.option("--level-text", type=options.PATH, help="measured: a UTF-8 text to read.  [default: built in]"),
)
