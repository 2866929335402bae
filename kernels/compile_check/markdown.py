"""The committed table as the section of docs/kernels.md: one table a kernel, one line a case."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from qtool.kernels.compile_check.table import Row
from qtool.kernels.compile_check.targets import FLOOR_TARGET

BEGIN, END = "<!-- compile table: begin -->", "<!-- compile table: end -->"
OTHERS = ("sm_80", "sm_89", "gfx942")
HEAD = (
    f"| Case | Loop on {FLOOR_TARGET} | Registers | Blocks | Share of floor | "
    + " | ".join(f"{target}: loop / registers / blocks" for target in OTHERS)
    + f" | Most frequent instructions ({FLOOR_TARGET}) |"
)


def section(rows: Iterable[Row]) -> str:
    """The text between the marks, marks included; numbers of the newest Triton in the table."""
    rows = list(rows)
    newest = max((row.triton for row in rows), default="", key=_version)
    chosen = sorted((row for row in rows if row.triton == newest), key=lambda row: row.kernel)
    parts = [BEGIN, f"Triton {newest}.", ""]
    for kernel, of_kernel in groupby(chosen, key=lambda row: row.kernel):
        parts += [f"### {kernel}", "", HEAD, "|---" * 9 + "|"]
        by_case: dict[str, dict[str, Row]] = {}
        for row in of_kernel:
            by_case.setdefault(row.case, {})[row.target] = row
        parts += [_line(case, targets) for case, targets in sorted(by_case.items(), key=lambda item: _natural(item[0]))]
        parts.append("")
    return "\n".join([*parts, END])


def with_section(document: str, rows: Iterable[Row]) -> str:
    """The document with its section replaced.

    Raises:
        ValueError: when the marks are not in it.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no section between {BEGIN} and {END}")
    return before + section(rows) + after


def _line(case: str, targets: dict[str, Row]) -> str:
    main = targets.get(FLOOR_TARGET)
    cells = [f"`{case}`", *(_main_cells(main) if main else ("—",) * 4)]
    cells += [_short(targets.get(target)) for target in OTHERS]
    cells.append(f"{main.mix}" if main else "—")
    return "| " + " | ".join(cells) + " |"


def _main_cells(row: Row) -> tuple[str, str, str, str]:
    share = "—" if row.share is None else f"{row.share:.0%}"
    return _count(row), f"{row.registers}{_spilled(row)}", str(row.blocks), share


def _short(row: Row | None) -> str:
    return "—" if row is None else f"{_count(row)} / {row.registers}{_spilled(row)} / {row.blocks}"


def _count(row: Row) -> str:
    """The main loop's instructions with its matrix instruction, or the whole kernel's."""
    if row.loop:
        return f"{row.loop} {row.matrix}"
    return f"all {row.instructions}" if row.instructions else row.matrix or "—"


def _spilled(row: Row) -> str:
    return f" + {row.spill} spills" if row.spill else ""


def _version(text: str) -> list[int]:
    return [int(part) for part in text.split(".") if part.isdigit()]


def _natural(name: str) -> list[tuple[int, str]]:
    """A sorting key that puts m16 before m128."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
