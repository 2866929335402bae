"""The compile check as a command: one line a case and target, exit code 5 when something is wrong."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import click

from qtool.errors import GateFailed, QtoolError
from qtool.kernels.compile_check.markdown import with_section
from qtool.kernels.compile_check.table import Row, read_table, write_table
from qtool.kernels.compile_check.targets import TARGETS

HEADER = (
    f"{'kernel':20}{'case':34}{'target':8}{'loop':>6}{'all':>7}{'regs':>6}{'spill':>6}{'shared':>8}{'blocks':>7}"
    f"{'share':>7}  matrix"
)


def line(kernel: str, case: str, target: str, row: Row | None, problems: tuple[str, ...]) -> str:
    """One row of the printed table."""
    text = f"{kernel:20}{case:34}{target:8}"
    if row is not None:
        share = "" if row.share is None else f"{row.share:.0%}"
        text += f"{row.loop:6}{row.instructions:7}{row.registers:6}{row.spill:6}{row.shared:8}{row.blocks:7}{share:>7}"
        text += f"  {row.matrix:9}"
    return text + ("" if not problems else f"  WRONG: {'; '.join(problems)}")


@click.command()
@click.option("--kernel", help="Only this kernel's cases.")
@click.option("--target", type=click.Choice(sorted(TARGETS)), help="Only this target.")
@click.option("--changed", is_flag=True, help="Compile only what differs from what the committed numbers came from.")
@click.option("--write", is_flag=True, help="Put the numbers into the committed table, in place of a comparison.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default="one a core", help="Processes to compile in.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option(
    "--docs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put the committed table into this document's section and compile nothing.",
)
def main(docs: Path | None, as_json: bool, **options: Any) -> None:
    """Compile every shipped kernel for GPUs that are not there, and check what came out."""
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        if docs is not None:
            docs.write_text(with_section(docs.read_text(encoding="utf-8"), read_table().values()), encoding="utf-8")
        else:
            _run(out=sys.stderr if as_json else sys.stdout, as_json=as_json, **options)
    except QtoolError as error:
        sys.stderr.write(f"{error.line()}\n")
        sys.exit(error.exit_code)


def _run(
    kernel: str | None, target: str | None, changed: bool, write: bool, jobs: int, as_json: bool, out: TextIO
) -> None:
    # Triton reads TRITON_INTERPRET when it is imported.
    import triton

    from qtool.kernels.compile_check.check import Checked, Plan, check

    def show(c: Checked) -> None:
        out.write(f"{line(c.kernel, c.case, c.target, c.row, c.problems)}\n")
        out.flush()

    committed = read_table()
    out.write(f"{HEADER}\n")
    plan = Plan(committed, compare=not write, changed=changed)
    done = check(kernel, plan, target=target, jobs=jobs, progress=show)
    if as_json:
        sys.stdout.write(json.dumps([{**asdict(c), "problems": list(c.problems)} for c in done], indent=1) + "\n")
    if write:
        rows = [c.row for c in done if c.row is not None]
        known = read_table().values()  # again: another kernel may have been written meanwhile
        replaced = [r for r in known if r.triton == triton.__version__]
        replaced = [r for r in replaced if kernel in (None, r.kernel) and target in (None, r.target)]
        write_table([*(r for r in known if r not in replaced), *rows])
    wrong = sum(bool(c.problems) for c in done)
    if wrong:
        raise GateFailed("compile check", f"{wrong} of {len(done)} cases are wrong", "see the lines above")
    out.write(f"{len(done)} cases as expected\n")


if __name__ == "__main__":
    main()
