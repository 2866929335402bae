"""Compiles cases, several at once, and gathers rows and problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context

import triton

from qtool.kernels.compile_check.build import build, fingerprint
from qtool.kernels.compile_check.case import Case
from qtool.kernels.compile_check.registry import cases
from qtool.kernels.compile_check.report import problems
from qtool.kernels.compile_check.table import Row, grown, row

Committed = dict[tuple[str, str, str, str], Row]
Item = tuple[str, str, str]  # kernel, case, target


@dataclass(frozen=True)
class Checked:
    """One case on one target: its numbers (None when it does not compile), and what is wrong with it."""

    kernel: str
    case: str
    target: str
    row: Row | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How to check.

    Attributes:
        committed: what `table.read_table` gave.
        compare: whether growth over the committed numbers is a problem.
        changed: take the committed numbers of whatever is the same as when they were written, and compile the rest.
    """

    committed: Committed
    compare: bool = True
    changed: bool = False


def check(
    kernel: str | None,
    plan: Plan,
    *,
    target: str | None = None,
    jobs: int = 1,
    progress: Callable[[Checked], None] = lambda checked: None,
) -> list[Checked]:
    """Check every case of a kernel (of all, when None).

    Args:
        kernel: folder name.
        plan: how.
        target: only this one of a case's targets.
        jobs: processes to compile in.
        progress: told of every result, in the order of the cases.
    """
    todo = [
        (folder, case.name, name)
        for folder, case in cases(kernel)
        for name in case.targets
        if target is None or name == target
    ]
    done = []
    for checked in _checked(todo, plan, jobs):
        progress(checked)
        done.append(checked)
    return done


def _checked(todo: list[Item], plan: Plan, jobs: int) -> Iterator[Checked]:
    known = {item: same for item in todo if (same := _unchanged(item, plan))} if plan.changed else {}
    compiled = _compiled([item for item in todo if item not in known], plan, jobs)
    yield from (known[item] if item in known else next(compiled) for item in todo)


def _compiled(todo: list[Item], plan: Plan, jobs: int) -> Iterator[Checked]:
    if jobs <= 1 or len(todo) <= 1:
        yield from (compile_one(item, plan) for item in todo)
        return
    # Spawned: a compiler's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_one, todo, repeat(plan))


def _unchanged(item: Item, plan: Plan) -> Checked | None:
    old = plan.committed.get((*item, triton.__version__))
    if old is None or old.fingerprint != fingerprint(_case(item), item[2]):
        return None
    return Checked(*item, old, ())


def compile_one(item: Item, plan: Plan) -> Checked:
    """One case for one target."""
    case, target = _case(item), item[2]
    try:
        report = build(case, target)
    except Exception as error:  # Triton's compiler raises types of its own and of LLVM's
        reason = str(error).strip().splitlines() or [""]
        return Checked(*item, None, (f"{type(error).__name__}: {reason[-1][:200]}",))
    wrong = problems(report, case.expected(target))
    mark = "" if wrong else fingerprint(case, target)
    numbers = row(item[0], item[1], case.work, report, triton.__version__, mark)
    if plan.compare:
        wrong += grown(numbers, plan.committed)
    return Checked(*item, numbers, tuple(wrong))


def _case(item: Item) -> Case:
    return next(case for _, case in cases(item[0]) if case.name == item[1])
