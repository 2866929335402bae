"""One section of the report: a heading, one sentence that says what to see, and a figure or a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Plain cells. Columns whose name ends in "*" are text and stand left; the star is not shown."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report.

    Attributes:
        name: the anchor and the figure's file name.
        title: the heading.
        sentence: what to see in the figure, from its numbers; or why there is none.
        png: the figure; empty when the section does not apply.
        how: how to read the figure: axes, colours, definitions.
        table: the same in numbers, where a table says more.
    """

    name: str
    title: str
    sentence: str
    png: bytes = b""
    how: str = ""
    table: Table | None = None
