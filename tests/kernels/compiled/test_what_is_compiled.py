"""The checker compiles what changed, believes its own committed numbers for the rest, and never a wrong kernel's."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")
import triton

from qtool.kernels.compile_check import Case, Expect, Report, check
from qtool.kernels.compile_check.check import Plan
from qtool.kernels.compile_check.table import row

REPORT = Report("sm_90", 4, 1024, 40, 0, Counter({"wgmma.s8": 8}), Counter({"IGMMA": 8}), Counter({"IGMMA": 8}))


class Checker:
    """The checker with a pretended compiler that counts its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, expect: Expect) -> None:
        case = Case(
            name="m16", kernel=None, signature={}, constexprs={}, targets=["sm_90"], expect={"sm_90": expect}
        )
        self.built = 0
        self.source = "source"
        monkeypatch.setattr(check, "cases", lambda kernel: [("gemm", case)])
        monkeypatch.setattr(check, "fingerprint", lambda case, target: self.source)
        monkeypatch.setattr(check, "build", self._build)

    def _build(self, case: Case, target: str) -> Report:
        self.built += 1
        return REPORT

    def run(self, *rows: object, changed: bool = True, compare: bool = True) -> check.Checked:
        plan = Plan({r.key: r for r in rows}, compare=compare, changed=changed)
        return check.check(None, plan)[0]


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Checker:
    return Checker(monkeypatch, Expect(has=["wgmma.s8"]))


def test_what_is_as_committed_is_not_compiled_again(checker: Checker) -> None:
    first = checker.run(compare=False)
    assert (checker.built, first.problems) == (1, ())
    assert checker.run(first.row) == first
    assert checker.built == 1
    checker.run(first.row, changed=False)
    assert checker.built == 2


def test_another_source_is_compiled_and_compared(checker: Checker) -> None:
    first = checker.run(compare=False)
    checker.source = "another"
    smaller = row("gemm", "m16", None, REPORT, triton.__version__, "source")
    assert checker.run(smaller).problems == ()
    assert checker.built == 2
    assert first.row is not None
    half = type(first.row)(**{**first.row.__dict__, "registers": 20})
    assert checker.run(half).problems == ("registers 40, was 20",)


def test_a_wrong_kernels_numbers_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(monkeypatch, Expect(has=["wgmma.rs"]))
    first = checker.run(compare=False)
    assert first.problems == ("no wgmma.rs",)
    assert first.row is not None
    assert first.row.fingerprint == ""
    assert checker.run(first.row).problems == ("no wgmma.rs",)
    assert checker.built == 2


def test_what_does_not_compile_is_a_problem(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Case, target: str) -> Report:
        raise RuntimeError("first line\nthe reason")

    monkeypatch.setattr(check, "build", fail)
    assert checker.run().problems == ("RuntimeError: the reason",)
