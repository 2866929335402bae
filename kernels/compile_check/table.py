"""The committed numbers of every case, and what grew beyond them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qtool.kernels.compile_check.case import Work
from qtool.kernels.compile_check.report import Report
from qtool.kernels.compile_check.targets import FLOOR_TARGET

TABLE = Path(__file__).with_name("table.json")
ALLOWED_GROWTH = 1.10
WATCHED = ("loop", "instructions", "registers", "shared")
# Small kernels move by a few instructions from one assembler to the next.
SLACK = 4


@dataclass(frozen=True)
class Row:
    """One case on one target with one Triton.

    Attributes:
        kernel, case, target, triton: what it is.
        loop: machine instructions of the main loop, 0 without one (and on AMD, where they are not read).
        instructions: of the whole kernel.
        matrix: the tensor-core instruction of the loop.
        mix: the main loop's (the kernel's) most frequent opcodes with their counts.
        registers, spill, shared, blocks: see `Report`.
        share: predicted share of the H200's floor, None where it is not predicted.
        fingerprint: of what was compiled (see `build.fingerprint`); empty when something was wrong with it.
    """

    kernel: str
    case: str
    target: str
    triton: str
    loop: int
    instructions: int
    matrix: str
    mix: str
    registers: int
    spill: int
    shared: int
    blocks: int
    share: float | None
    fingerprint: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the row is about."""
        return self.kernel, self.case, self.target, self.triton


def row(kernel: str, case: str, work: Work | None, report: Report, triton: str, fingerprint: str = "") -> Row:
    """The row of a report."""
    share = report.share_of_floor(work) if work and report.target == FLOOR_TARGET else None
    return Row(
        kernel=kernel,
        case=case,
        target=report.target,
        triton=triton,
        loop=report.loop.total(),
        instructions=report.opcodes.total(),
        matrix=report.matrix or _matrix_class(report),
        mix=" ".join(f"{opcode} {count}" for opcode, count in _frequent(report)),
        registers=report.registers,
        spill=report.spill,
        shared=report.shared,
        blocks=report.blocks,
        share=None if share is None else round(share, 2),
        fingerprint=fingerprint,
    )


def grown(new: Row, committed: dict[tuple[str, str, str, str], Row]) -> list[str]:
    """What is more than a tenth above the committed numbers, one phrase each; a missing row is one, too."""
    old = committed.get(new.key)
    if old is None:
        if all(key[3] != new.triton for key in committed):
            return []  # a Triton we hold no numbers for: the expectations alone count
        return ["not in table.json; python -m qtool.kernels.compile_check --write adds it"]
    return [
        f"{name} {getattr(new, name)}, was {getattr(old, name)}"
        for name in WATCHED
        if getattr(new, name) > max(getattr(old, name) * ALLOWED_GROWTH, getattr(old, name) + SLACK)
    ]


def read_table(path: Path = TABLE) -> dict[tuple[str, str, str, str], Row]:
    """The committed rows; none when there is no table yet."""
    if not path.exists():
        return {}
    rows = [Row(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    return {row.key: row for row in rows}


def write_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Replace the committed rows; one row a line, sorted, so that a change shows as such."""
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in sorted(rows, key=lambda row: row.key)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _matrix_class(report: Report) -> str:
    """AMD's matrix instruction, from the assembly's text."""
    return next((name for name in report.classes if name.startswith("mfma")), "")


def _frequent(report: Report, most: int = 6) -> list[tuple[str, int]]:
    return sorted(report.counted.items(), key=lambda item: (-item[1], item[0]))[:most]
