"""Mathematics: every statement is true by exact fractions, no two problems are alike, the text never changes."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from math import comb, factorial, gcd, lcm
from typing import Any

import pytest

from qtool.quantize.inputs.domains_draw import Draw
from qtool.quantize.inputs.domains_mathematics import PROBLEMS, mathematics_text

Environment = dict[str, Any]
UNKNOWNS = "xyzknS"
# A statement: numbers, single letters, signs and brackets around at least one equals sign.
_STATEMENT = re.compile(rf"(?:(?<![A-Za-z])[{UNKNOWNS}](?![A-Za-z])|[\d()+\-*/^=≡ ]|mod)+")
_LATEX = (
    (re.compile(r"\\(?:cdot|times)|[·×]"), "*"),
    (re.compile(r"\\equiv"), "≡"),
    (re.compile(r"\\pmod\{(\d+)\}"), r"(mod \1)"),
    (re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\binom\{(\d+)\}\{(\d+)\}"), r"C(\1, \2)"),
    (re.compile(r"\\mathrm\{lcm\}"), "lcm"),
    (re.compile(r"[$\\&]|\[|\]"), "|"),
)
_CALLS = {"C": comb, "gcd": gcd, "lcm": lcm}


def plain(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\b(C|gcd|lcm)\((\d+), (\d+)\)", lambda m: str(_CALLS[m[1]](int(m[2]), int(m[3]))), text)
    return re.sub(r"(\d+)!", lambda m: str(factorial(int(m[1]))), text)


def value(expression: str, env: Environment) -> Any:
    code = expression.strip().replace("^", "**")
    code = re.sub(rf"(?<=[\d)xyzkn])\s*(?=[{UNKNOWNS}])|(?<=[\d)xyzkn])\s*(?=\()", "*", code)
    code = re.sub(r"\d+", r"F(\g<0>)", code)
    return eval(code, {"__builtins__": {}}, {"F": Fraction, **env})


def holds(statement: str, env: Environment) -> bool:
    """Is a chain like `a = b ≡ c (mod m)` true?"""
    modulus = re.search(r"\(mod (\d+)\)", statement)
    sides = re.split(r"([=≡])", statement[: modulus.start()] if modulus else statement)
    values = [value(side, env) for side in sides[::2]]
    pairs = zip(values, values[1:], sides[1::2], strict=False)
    return all(a == b if sign == "=" else (a - b) % int(modulus[1]) == 0 for a, b, sign in pairs)  # type: ignore[index]


def statements(problem: str) -> Iterator[str]:
    for line in plain(problem).splitlines():
        for found in _STATEMENT.finditer(line):
            text = found[0].strip()
            if ("=" in text or "≡" in text) and not text.startswith(("=", "≡")):
                yield text.removesuffix("(").strip()


def environments(problem: str) -> list[Environment]:
    """What the unknowns may be: the answers, some numbers for n and k, and the sum that a proof claims."""
    env: Environment = {}
    if claim := re.search(r"Claim: S\(n\) = (.*)", problem):
        text = plain(claim[1])
        env["S"] = lambda n: value(text, {"n": n})
    if "k + 1" in problem:
        return [{**env, "k": Fraction(i), "n": Fraction(i)} for i in range(1, 7)]
    answer = plain(next((line for line in problem.splitlines() if line.startswith("Answer")), ""))
    answer = answer.partition(":")[2].replace("|", " ")
    if " or " in answer:
        return [{"x": value(root.partition("=")[2], {})} for root in answer.split(" or ")]
    return [
        {part.partition("=")[0].strip(): value(part.partition("=")[2], {}) for part in answer.split(" and ") if part}
    ]


def solved_congruence(problem: str) -> tuple[list[str], list[Environment]]:
    """Statements about z, whose congruence must have one solution, each with its modulus."""
    found = list(statements(problem))
    modulus = int(re.findall(r"\(mod (\d+)\)", found[0])[0])
    fits = [z for z in range(modulus) if holds(found[0], {"z": z})]
    assert len(fits) == 1, problem
    return [text if "mod" in text else f"{text} (mod {modulus})".replace("=", "≡") for text in found], [{"z": fits[0]}]


def check(problem: str) -> int:
    """Assert that every statement of a problem is true; returns how many equals signs there were."""
    found, envs = list(statements(problem)), environments(problem)
    if problem.startswith("Solve the congruence"):
        found, envs = solved_congruence(problem)
    for number, text in enumerate(found):
        if text == "n = 1":
            continue
        results = [holds(text, env) for env in envs]
        every = number == 0 or "k" in text or "n" in text
        assert all(results) if every else any(results), f"{text} is false in:\n{problem}"
    return sum(text.count("=") + text.count("≡") for text in found)


PROBLEM_TEXTS = mathematics_text(150_000).strip().split("\n\n")


def test_every_statement_is_true() -> None:
    counts = [check(problem) for problem in PROBLEM_TEXTS]
    assert sum(counts) > 3000
    assert sum(count < 2 for count in counts) < len(counts) / 100  # primes have nothing to show


def test_the_checker_sees_every_wrong_result_in_every_kind_of_problem() -> None:
    for problem in PROBLEM_TEXTS[: len(PROBLEMS)]:
        results = list(re.finditer(r"(?:= |≡ )-?(?:\\frac\{)?-?(\d+)", problem))
        for found in results:
            wrong = f"{problem[: found.start(1)]}{int(found[1]) + 1}{problem[found.end(1) :]}"
            with pytest.raises((AssertionError, ZeroDivisionError)):
                check(wrong)


def test_digits_carries_and_euclid() -> None:
    carries = re.findall(r"= (\d+), write (\d), carry (\d)\.", "\n".join(PROBLEM_TEXTS))
    assert len(carries) > 50 and all(int(total) == 10 * int(carry) + int(digit) for total, digit, carry in carries)
    rests = re.findall(r"(?:Bring down \d: |Begin with )(\d+) = (\d+) · (\d+) \+ (\d+)", "\n".join(PROBLEM_TEXTS))
    assert len(rests) > 30 and all(int(digit) < 10 and int(rest) < int(by) for _, digit, by, rest in rests)


def test_no_two_problems_are_equal_and_every_kind_occurs() -> None:
    assert len(set(PROBLEM_TEXTS)) == len(PROBLEM_TEXTS)
    assert len(PROBLEM_TEXTS) > 10 * len(PROBLEMS)
    assert max(Counter(problem.split()[0] for problem in PROBLEM_TEXTS).values()) < len(PROBLEM_TEXTS) / 3


def test_a_longer_text_begins_with_a_shorter_one() -> None:
    assert mathematics_text(30_000).startswith(mathematics_text(5_000).rstrip("\n"))
    assert 5_000 <= len(mathematics_text(5_000)) < 7_000


def test_the_text_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(mathematics_text(100_000).encode()).hexdigest()
    assert digest == "a92a26e90d70edb26832c8df84e9ff8e2715b74a0fe6d6210675f0fc1e9d79c3"


def test_draws_cover_their_range_evenly() -> None:
    draw = Draw("test")
    counts = Counter(draw.between(-2, 7) for _ in range(5000))
    assert sorted(counts) == list(range(-2, 8)) and all(400 < count < 600 for count in counts.values())
    assert all(draw.nonzero(-1, 1) for _ in range(50))
