"""Worked problems of counting, chance and everyday sums. One function a kind of problem."""

from __future__ import annotations

from fractions import Fraction
from math import comb, factorial, perm

from qtool.quantize.inputs.domains_arithmetic import latex
from qtool.quantize.inputs.domains_draw import Draw

NAMES = ("Amara", "Bruno", "Celeste", "Dmitri", "Esther", "Farid", "Greta", "Hugo", "Ines", "Jakob", "Keiko", "Leon")
GOODS = (
    ("notebook", "notebooks"),
    ("lantern", "lanterns"),
    ("jar of honey", "jars of honey"),
    ("sack of lime", "sacks of lime"),
    ("bicycle tube", "bicycle tubes"),
    ("roll of wire", "rolls of wire"),
    ("tin of paint", "tins of paint"),
    ("basket", "baskets"),
)
GROUPS = ("a committee", "a relay team", "a jury", "a tasting panel", "a study group")
PEOPLE = ("teachers", "rowers", "gardeners", "engineers", "singers", "volunteers")


def choosing(draw: Draw) -> str:
    """How many choices of k out of n, without order."""
    people = draw.between(6, 30)
    chosen = draw.between(2, min(6, people - 2))
    ways = comb(people, chosen)
    above = " · ".join(str(people - i) for i in range(chosen))
    below = " · ".join(str(chosen - i) for i in range(chosen))
    group, kind = draw.choose(GROUPS), draw.choose(PEOPLE)
    lines = (
        f"In how many ways can {group} of {chosen} be chosen from {people} {kind}?",
        "The order of the choice does not matter, so we count subsets:",
        f"C({people}, {chosen}) = ({above})/({below}) = {perm(people, chosen)}/{factorial(chosen)} = {ways}.",
        f"Leaving out {people - chosen} is the same choice, and indeed C({people}, {people - chosen}) = {ways}.",
    )
    return "\n".join(lines)


def pascal(draw: Draw) -> str:
    """Pascal's rule for two binomial coefficients, in LaTeX."""
    n = draw.between(6, 60)
    k = draw.between(2, min(n - 2, 8))
    left, right = comb(n, k - 1), comb(n, k)
    return "\n".join(
        (
            rf"Use Pascal's rule to evaluate $\binom{{{n + 1}}}{{{k}}}$, given that "
            rf"$\binom{{{n}}}{{{k - 1}}} = {left}$ and $\binom{{{n}}}{{{k}}} = {right}$.",
            rf"\[ \binom{{{n + 1}}}{{{k}}} = \binom{{{n}}}{{{k - 1}}} + \binom{{{n}}}{{{k}}} "
            rf"= {left} + {right} = {left + right} \]",
        )
    )


def arrangements(draw: Draw) -> str:
    """Arrangements of things of which some are alike."""
    counts = [draw.between(1, 4) for _ in range(draw.between(2, 4))]
    colours = ("red", "blue", "green", "white", "black", "yellow")
    start = draw.between(0, len(colours) - 1)
    named = [f"{count} {colours[(start + i) % len(colours)]}" for i, count in enumerate(counts)]
    total, ways = sum(counts), factorial(sum(counts))
    below = 1
    for count in counts:
        below *= factorial(count)
    alike = " · ".join(f"{count}!" for count in counts)
    thing = draw.choose(("flags", "beads", "tiles", "cards", "ribbons"))
    listed = ", ".join(named[:-1]) + f" and {named[-1]}"
    return "\n".join(
        (
            f"How many different rows can be made of {listed} {thing}, if {thing} of one colour look alike?",
            f"There are {total}! = {ways} orders of {total} different {thing}. Swapping equal ones changes nothing, "
            f"so every row was counted {alike} = {below} times.",
            f"The answer is {ways} / {below} = {ways // below}.",
        )
    )


def urn(draw: Draw) -> str:
    """Two draws from an urn without putting back, in LaTeX."""
    red, blue = draw.between(2, 20), draw.between(2, 20)
    total = red + blue
    same = Fraction(red * (red - 1) + blue * (blue - 1), total * (total - 1))
    first = rf"\frac{{{red}}}{{{total}}} \cdot \frac{{{red - 1}}}{{{total - 1}}}"
    second = rf"\frac{{{blue}}}{{{total}}} \cdot \frac{{{blue - 1}}}{{{total - 1}}}"
    return "\n".join(
        (
            f"A bag holds {red} red and {blue} blue marbles. Two are drawn without looking and without putting the "
            "first one back. How likely is it that they have the same colour?",
            rf"\[ {first} + {second} = \frac{{{red * (red - 1)} + {blue * (blue - 1)}}}{{{total * (total - 1)}}} "
            rf"= {latex(same)} \]",
            rf"The probability of two different colours is therefore $1 - {latex(same)} = {latex(1 - same)}$.",
        )
    )


def shopping(draw: Draw) -> str:
    """A bill with two prices and the change."""
    name, (other, others) = draw.choose(NAMES), draw.choose(GOODS)
    goods = draw.choose([many for _, many in GOODS if many != others])
    count, price, single = draw.between(2, 19), draw.between(2, 48), draw.between(3, 95)
    cost = count * price + single
    paid = (cost // 50 + 1) * 50
    return "\n".join(
        (
            f"{name} buys {count} {goods} at {price} coins each and one {other} for {single} coins, and pays with "
            f"{paid}. How much change is due?",
            f"The {goods} cost {count} · {price} = {count * price}.",
            f"With the {other}: {count * price} + {single} = {cost}.",
            f"Change: {paid} - {cost} = {paid - cost}.",
        )
    )


def meeting(draw: Draw) -> str:
    """Two travellers who approach each other."""
    first, second = draw.between(3, 30), draw.between(3, 30)
    hours = draw.between(2, 14)
    distance = (first + second) * hours
    name = draw.choose(NAMES)
    other = draw.choose([person for person in NAMES if person != name])
    return "\n".join(
        (
            f"{name} and {other} start at the same moment from two towns {distance} km apart and travel toward each "
            f"other, {name} at {first} km/h and {other} at {second} km/h. When do they meet?",
            f"Together they close the gap by {first} + {second} = {first + second} km each hour.",
            f"They need {distance} / {first + second} = {hours} hours. By then {name} has covered {first} · {hours} = "
            f"{first * hours} km and {other} {second} · {hours} = {second * hours} km.",
            f"Together that makes {first * hours} + {second * hours} = {distance} km, as it should.",
        )
    )


def percentage(draw: Draw) -> str:
    """A price that rises and falls by a percentage."""
    price, percent = 100 * draw.between(2, 90), draw.choose((5, 10, 15, 20, 25, 30, 40, 50))
    rise = price * percent // 100
    high = price + rise
    fall = Fraction(high * percent, 100)
    end = high - fall
    subject = draw.choose(("The rent of a workshop", "The price of a piano", "The monthly output of a machine"))
    return "\n".join(
        (
            f"{subject} is {price}. It rises by {percent}% and later falls by {percent}%. Is it the same as before?",
            f"The rise is {price} · {percent}/100 = {rise}, which gives {price} + {rise} = {high}.",
            f"The fall is {high} · {percent}/100 = {fall}, which gives {high} - {fall} = {end}.",
            f"No: {price} - {end} = {price - end} is missing, as the second percentage is taken of a larger number.",
        )
    )


def determinant(draw: Draw) -> str:
    """The determinant and the square of a 2 × 2 matrix, in LaTeX."""
    a, b, c, d = (draw.between(0, 12) for _ in range(4))
    value = a * d - b * c
    rows = ((a * a + b * c, a * b + b * d), (c * a + d * c, c * b + d * d))
    verdict = "is not invertible" if value == 0 else "is invertible"
    return "\n".join(
        (
            rf"Let $A = \begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}$. Find $\det A$ and $A^2$.",
            rf"\[ \det A: \quad {a} \cdot {d} - {b} \cdot {c} = {value}, \]",
            f"so that $A$ {verdict}. The entries of the square are",
            rf"${a} \cdot {a} + {b} \cdot {c} = {rows[0][0]}$, ${a} \cdot {b} + {b} \cdot {d} = {rows[0][1]}$,",
            rf"${c} \cdot {a} + {d} \cdot {c} = {rows[1][0]}$, ${c} \cdot {b} + {d} \cdot {d} = {rows[1][1]}$.",
        )
    )
