"""The gate of every export: a verification is told, refuses the package when it failed, and is stored beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli.report import print_verification
from qtool.errors import GateFailed
from qtool.quantize.artifacts.store import write_file

if TYPE_CHECKING:
    from qtool.runtime.verify import Verification


def gate(
    result: Verification, folder: Path, output: Path, *, failed: str, remedy: str, quiet: bool
) -> dict[str, Any]:
    """What the verification found, as plain data.

    Args:
        result: of the package.
        folder: where it is staged.
        output: what it will be called.
        failed: what a failure means, "does not pass".
        remedy: of a failure.
        quiet: print nothing.

    Raises:
        GateFailed: naming the check that failed.
    """
    found: dict[str, Any] = result.to_json()
    if not quiet:
        print_verification(found)
    if not result.passed:
        raise GateFailed(output, f"{failed}: {result.failure}", remedy)
    write_file(folder / "verification.json", result.to_bytes())
    return found
