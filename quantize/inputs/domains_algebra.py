"""Worked problems of algebra: equations with every step, systems, induction. One function a kind of problem."""

from __future__ import annotations

from fractions import Fraction
from math import gcd

from qtool.quantize.inputs.domains_arithmetic import latex
from qtool.quantize.inputs.domains_draw import Draw


def terms(*parts: tuple[int, str]) -> str:
    """Coefficients and powers as people write them: (1, "x^2"), (-5, "x"), (6, "") is x^2 - 5x + 6."""
    shown = ""
    for factor, power in parts:
        if factor:
            sign = (" - " if factor < 0 else " + ") if shown else ("-" if factor < 0 else "")
            shown += sign + (str(abs(factor)) if abs(factor) != 1 or not power else "") + power
    return shown or "0"


def in_brackets(value: Fraction | int) -> str:
    """A number as a factor: brackets around what is negative or a fraction."""
    return f"({value})" if value < 0 or Fraction(value).denominator > 1 else str(value)


def linear(draw: Draw) -> str:
    """a x + b = c x + d, with its check."""
    left, right = draw.nonzero(-9, 12), draw.nonzero(-9, 9)
    if left == right:
        left = left + 1 or left + 2
    solution = Fraction(draw.between(-40, 40), draw.choose((1, 1, 1, 2, 3)))
    across = (left - right) * solution
    right_number = draw.between(-30, 30)
    scale = across.denominator
    left, right, across, right_number = left * scale, right * scale, across * scale, right_number * scale
    left_number = right_number - int(across)
    value = (right * solution) + right_number
    equation = f"{terms((left, 'x'), (left_number, ''))} = {terms((right, 'x'), (right_number, ''))}"
    opening = draw.choose(("Solve {}.", "For which x is {}?", "Find the solution of the equation {}."))
    lines = [opening.format(equation)]
    if left_number:
        verb = f"Subtract {left_number} from" if left_number > 0 else f"Add {-left_number} to"
        lines.append(f"{verb} both sides: {terms((left, 'x'))} = {terms((right, 'x'), (int(across), ''))}")
    verb = f"Subtract {terms((right, 'x'))} from" if right > 0 else f"Add {terms((-right, 'x'))} to"
    lines.append(f"{verb} both sides: {terms((left - right, 'x'))} = {int(across)}")
    if left - right != 1:
        lines.append(f"Divide both sides by {left - right}: x = {solution}")
    shown = in_brackets(solution)
    checks = (
        f"{factor} · {shown} + {in_brackets(number)} = {value}"
        for factor, number in ((left, left_number), (right, right_number))
    )
    lines.append(f"Check: {' and '.join(checks)}.")
    return "\n".join([*lines, f"Answer: x = {solution}"])


def quadratic_by_factors(draw: Draw) -> str:
    """x^2 + p x + q = 0 with integer roots, by factors."""
    first, second = draw.nonzero(-15, 15), draw.nonzero(-15, 15)
    equation = terms((1, "x^2"), (-first - second, "x"), (first * second, ""))
    brackets = "".join(f"({terms((1, 'x'), (-root, ''))})" for root in (first, second))
    lines = [
        f"Solve {equation} = 0 by factoring.",
        f"We look for two numbers with product {first * second} and sum {first + second}: "
        f"{in_brackets(first)} · {in_brackets(second)} = {first * second} and "
        f"{in_brackets(first)} + {in_brackets(second)} = {first + second}.",
        f"So {brackets} = 0.",
        "A product is zero only if one of its factors is zero.",
    ]
    if first == second:
        return "\n".join([*lines, "Both factors are the same, so there is one double root.", f"Answer: x = {first}"])
    lines.append(f"Hence {terms((1, 'x'), (-first, ''))} = 0 or {terms((1, 'x'), (-second, ''))} = 0.")
    return "\n".join([*lines, f"Answer: x = {first} or x = {second}"])


def quadratic_by_formula(draw: Draw) -> str:
    """A quadratic equation with rational roots, by the discriminant, in LaTeX."""
    a, below = draw.between(2, 6), draw.between(1, 4)
    root, other = draw.nonzero(-9, 9), draw.between(-9, 9)
    square, line, number = a * below, -(a * other + root * below), root * other
    discriminant = line * line - 4 * square * number
    side = abs(a * other - root * below)
    found = sorted({Fraction(-line + side, 2 * square), Fraction(-line - side, 2 * square)})
    equation = terms((square, "x^2"), (line, "x"), (number, ""))
    lines = [
        f"Solve ${equation} = 0$ with the quadratic formula.",
        rf"The discriminant is $({line})^2 - 4 \cdot {square} \cdot ({number}) = {discriminant} = {side}^2$.",
    ]
    for sign, value in zip("+-", reversed(found), strict=False):
        lines.append(rf"\[ x = \frac{{{-line} {sign} {side}}}{{2 \cdot {square}}} = {latex(value)} \]")
    if len(found) == 1:
        lines.append("The discriminant is zero, so this is the only root.")
    return "\n".join([*lines, "Answer: " + " or ".join(f"$x = {latex(value)}$" for value in found)])


def completing_the_square(draw: Draw) -> str:
    """x^2 + 2 h x + c = 0 with integer roots, by completing the square."""
    half, distance = draw.nonzero(-14, 14), draw.between(1, 13)
    number = half * half - distance * distance
    equation = terms((1, "x^2"), (2 * half, "x"), (number, ""))
    moved = terms((1, "x^2"), (2 * half, "x"))
    bracket = terms((1, "x"), (half, ""))
    roots = (distance - half, -distance - half)
    return "\n".join(
        (
            f"Complete the square to solve {equation} = 0.",
            f"Half of the coefficient of x is {half}, and its square is {half * half}.",
            f"{moved} + {half * half} = {half * half} - {in_brackets(number)} = {distance * distance}",
            f"({bracket})^2 = {distance}^2",
            f"{bracket} = {distance} or {bracket} = -{distance}",
            f"Answer: x = {roots[0]} or x = {roots[1]}",
        )
    )


def system(draw: Draw) -> str:
    """Two equations in two unknowns, by elimination."""
    x, y = draw.between(-12, 12), draw.between(-12, 12)
    a, b, c = draw.between(1, 9), draw.nonzero(-7, 7), draw.between(1, 9)
    d = draw.nonzero(-7, 7)
    if a * d == b * c:
        d = d + 1 or 1
    if a * d == b * c:
        d += 1
    first, second = a * x + b * y, c * x + d * y
    divisor = gcd(a, c)
    over, under = c // divisor, a // divisor
    rest = over * b - under * d
    verb = "Multiply the first equation by {}, the second by {}, and subtract:"
    lines = [
        draw.choose(("Solve the system", "Find x and y such that both equations hold:")),
        f"{terms((a, 'x'), (b, 'y'))} = {first}",
        f"{terms((c, 'x'), (d, 'y'))} = {second}",
        verb.format(over, under),
        f"{terms((rest, 'y'))} = {over * first} - {in_brackets(under * second)} = {over * first - under * second}",
        f"This gives y = {y}. Put it into the first equation:",
        f"{terms((a, 'x'))} = {first} - {in_brackets(b)} · {in_brackets(y)} = {first - b * y}",
    ]
    return "\n".join([*lines, f"Answer: x = {x} and y = {y}"])


def induction_linear(draw: Draw) -> str:
    """The sum of an arithmetic progression, proved by induction."""
    first, step = draw.between(1, 60), 2 * draw.between(1, 30)
    half, offset = step // 2, first - step // 2
    closed = {n: terms((half, f"{n}^2"), (offset, n)) for n in ("n", "k", "(k + 1)")}
    term = {n: terms((step, n), (first - step, "")) for n in ("n", "(k + 1)")}
    opening = draw.choose(("We argue by induction on n.", "The proof is by induction."))
    lines = (
        f"Let S(n) be the sum of the first n terms of the progression that begins {first}, {first + step}, "
        f"{first + 2 * step}. Its n-th term is {term['n']}.",
        f"Claim: S(n) = {closed['n']}",
        f"{opening} For n = 1 the formula gives the first term: "
        f"S(1) = {half} · 1^2 + {in_brackets(offset)} · 1 = {first}.",
        "Assume the formula for some k and add the next term:",
        f"S(k + 1) = {closed['k']} + {term['(k + 1)']}",
        f"S(k + 1) = {terms((half, 'k^2'), (offset + step, 'k'), (first, ''))}",
        f"S(k + 1) = {closed['(k + 1)']}",
        "The last line is the formula for k + 1. ∎",
    )
    return "\n".join(lines)


def induction_geometric(draw: Draw) -> str:
    """The sum of a geometric progression, proved by induction."""
    first, ratio = draw.between(1, 25), draw.between(2, 6)
    factor = first * (ratio - 1)
    lines = (
        f"Let S(n) be the sum of the first n terms of the progression {first}, {first * ratio}, {first * ratio**2}, "
        f"where each term is {ratio} times the one before.",
        f"Claim: S(n) = {first} · ({ratio}^n - 1)/{ratio - 1}",
        f"Base case: S(1) = {first} · ({ratio}^1 - 1)/{ratio - 1} = {factor}/{ratio - 1} = {first}, the first term.",
        "Inductive step: suppose that the claim holds for k. Then",
        f"S(k + 1) = S(k) + {first} · {ratio}^k",
        f"S(k + 1) = ({first} · {ratio}^k - {first} + {factor} · {ratio}^k)/{ratio - 1}",
        f"S(k + 1) = ({first * ratio} · {ratio}^k - {first})/{ratio - 1} = {first} · ({ratio}^(k + 1) - 1)/{ratio - 1}",
        "which is the claim for k + 1. ∎",
    )
    return "\n".join(lines)


def induction_divisibility(draw: Draw) -> str:
    """b^n - 1 is divisible by b - 1, with a multiple: a small family of divisibility proofs."""
    base, factor = draw.between(3, 60), draw.between(2, 25)
    divisor = factor * (base - 1)
    lines = (
        f"Show that {factor} · {base}^n - {factor} is divisible by {divisor} for every n ≥ 1.",
        f"For n = 1 we have {factor} · {base}^1 - {factor} = {divisor}, which is divisible by {divisor}.",
        f"Suppose that {divisor} divides {factor} · {base}^k - {factor}. Now",
        f"{factor} · {base}^(k + 1) - {factor} = "
        f"{base} · ({factor} · {base}^k - {factor}) + {base * factor} - {factor}",
        f"and {base * factor} - {factor} = {divisor}. Both summands are divisible by {divisor}, so their sum is. ∎",
    )
    return "\n".join(lines)
