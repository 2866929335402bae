"""The cases that the kernel folders list."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from qtool.errors import UsageError, nearest
from qtool.kernels.compile_check.case import Case

KERNELS = Path(__file__).parent.parent


def kernels_with_cases() -> list[str]:
    """Names of the kernel folders that hold a `compile_cases.py`, sorted."""
    return sorted(path.parent.name for path in KERNELS.glob("*/compile_cases.py"))


def cases(kernel: str | None = None) -> Iterator[tuple[str, Case]]:
    """Every case with its folder's name, of one kernel or of all.

    Raises:
        UsageError: when no folder of that name lists cases, or a folder lists two of one name.
    """
    known = kernels_with_cases()
    if kernel is not None and kernel not in known:
        raise UsageError(f"kernel {kernel}", "lists no compile cases", nearest(kernel, known))
    for folder in known if kernel is None else [kernel]:
        listed: list[Case] = import_module(f"qtool.kernels.{folder}.compile_cases").CASES
        names = [case.name for case in listed]
        if len(set(names)) != len(names):
            raise UsageError(f"kernels/{folder}/compile_cases.py", "two cases of one name", "rename one")
        yield from ((folder, case) for case in listed)
