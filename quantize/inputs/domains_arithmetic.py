"""Worked problems of arithmetic: digit by digit, fractions, divisors, remainders. One function a kind of problem."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import zip_longest
from math import gcd, lcm

from qtool.quantize.inputs.domains_draw import Draw

PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands", "Hundred thousands")


def addition(draw: Draw) -> str:
    """A column addition with its carries."""
    first, second = draw.between(1000, 99_999), draw.between(100, 99_999)
    opening = draw.choose(("Add {} and {} digit by digit.", "What is the sum of {} and {}? We work from the right."))
    lines, carry = [opening.format(first, second)], 0
    columns = zip_longest(reversed(str(first)), reversed(str(second)), fillvalue="0")
    for place, (above, below) in zip(PLACES, columns, strict=False):
        total = int(above) + int(below) + carry
        carried = " + 1" if carry else ""
        carry = total // 10
        lines.append(f"{place}: {above} + {below}{carried} = {total}, write {total % 10}, carry {carry}.")
    return "\n".join([*lines, f"Therefore {first} + {second} = {first + second}."])


def multiplication(draw: Draw) -> str:
    """A long multiplication by its partial products."""
    first, second = draw.between(101, 9999), draw.between(12, 987)
    powers = enumerate(reversed(str(second)))
    parts = [int(digit) * 10**power for power, digit in powers if digit != "0"]
    lines = [draw.choose((f"Compute {first} × {second}.", f"Multiply {first} by {second}, one digit at a time."))]
    lines += [f"{first} × {part} = {first * part}" for part in parts]
    if len(parts) > 1:
        lines.append(" + ".join(str(first * part) for part in parts) + f" = {first * second}")
    last = draw.choose((f"Check: {first * second} / {first} = {second}.", f"So {first} × {second} = {first * second}."))
    return "\n".join([*lines, last])


def division(draw: Draw) -> str:
    """A long division, one digit of the quotient a line."""
    divisor, number = draw.between(6, 87), draw.between(1000, 999_999)
    lines = [f"Divide {number} by {divisor} with remainder."]
    rest, digits = 0, ""
    for digit in str(number):
        rest, previous = rest * 10 + int(digit), rest
        quotient = rest // divisor
        if digits or quotient:
            step = f"Bring down {digit}: " if digits else "Begin with "
            lines.append(f"{step}{rest} = {quotient} · {divisor} + {rest - quotient * divisor}.")
            digits += str(quotient)
        rest = (previous * 10 + int(digit)) % divisor
    lines.append(f"The quotient is {digits}, the remainder {rest}: {digits} · {divisor} + {rest} = {number}.")
    return "\n".join(lines)


def fraction_sum(draw: Draw) -> str:
    """Two fractions brought to one denominator, in LaTeX."""
    below = [draw.between(3, 24) for _ in range(2)]
    above = [draw.between(1, 2 * part) for part in below]
    sign, symbol = draw.choose(((1, "+"), (-1, "-")))
    common = lcm(*below)
    wide = [a * (common // b) for a, b in zip(above, below, strict=True)]
    total = wide[0] + sign * wide[1]
    shown = rf"\frac{{{above[0]}}}{{{below[0]}}} {symbol} \frac{{{above[1]}}}{{{below[1]}}}"
    lines = [
        rf"Simplify ${shown}$.",
        rf"The least common denominator is $\mathrm{{lcm}}({below[0]}, {below[1]}) = {common}$, so",
        rf"\[ {shown} = \frac{{{wide[0]}}}{{{common}}} {symbol} \frac{{{wide[1]}}}{{{common}}} "
        rf"= \frac{{{total}}}{{{common}}}. \]",
    ]
    if (divisor := gcd(total, common)) > 1:
        value = latex(Fraction(total, common))
        lines.append(rf"Both parts are divisible by {divisor}, hence $\frac{{{total}}}{{{common}}} = {value}$.")
    return "\n".join(lines)


def fraction_product(draw: Draw) -> str:
    """A product or a quotient of fractions, in LaTeX."""
    a, b, c, d = (draw.between(2, 35) for _ in range(4))
    product = rf"\frac{{{a}}}{{{b}}} \cdot \frac{{{c}}}{{{d}}} = \frac{{{a} \cdot {c}}}{{{b} \cdot {d}}}"
    whole = rf"{product} = \frac{{{a * c}}}{{{b * d}}} = {latex(Fraction(a * c, b * d))}"
    if draw.between(0, 1):
        return f"Multiply the fractions and reduce the result:\n$$ {whole}. $$"
    opening = rf"What is $\frac{{{a}}}{{{b}}}$ divided by $\frac{{{d}}}{{{c}}}$?"
    return f"{opening}\nDividing by a fraction means multiplying by its reciprocal:\n$$ {whole}. $$"


def latex(value: Fraction) -> str:
    r"""An integer as it is, another fraction as \frac."""
    if value.denominator == 1:
        return str(value.numerator)
    return ("-" if value < 0 else "") + rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def euclid(draw: Draw) -> str:
    """Euclid's algorithm, and the least common multiple from it."""
    factor = draw.between(2, 30)
    first, second = factor * draw.between(40, 300), factor * draw.between(5, 39)
    lines = [f"Find the greatest common divisor of {first} and {second} by Euclid's algorithm."]
    above, below = first, second
    while below:
        lines.append(f"{above} = {above // below} · {below} + {above % below}")
        above, below = below, above % below
    lines.append(f"The last nonzero remainder is {above}, so gcd({first}, {second}) = {above}.")
    lines.append(f"It follows that lcm({first}, {second}) = {first} · {second} / {above} = {first * second // above}.")
    return "\n".join(lines)


def divisors(draw: Draw) -> str:
    """The prime factors of a number, found by trial, and the number of its divisors."""
    number = draw.between(60, 9999)
    lines = [f"How many divisors does {number} have?"]
    powers = dict(_factors(number))
    if number in powers:
        return "\n".join([*lines, f"No prime up to its square root divides {number}: it is prime and has 2 divisors."])
    rest = number
    for prime, power in powers.items():
        for _ in range(power):
            lines.append(f"{rest} / {prime} = {rest // prime}")
            rest //= prime
    product = " · ".join(f"{prime}^{power}" if power > 1 else f"{prime}" for prime, power in powers.items())
    count = 1
    for power in powers.values():
        count *= power + 1
    choices = "".join(f"({power} + 1)" for power in powers.values())
    lines.append(f"Thus {number} = {product}, and the number of divisors is {choices} = {count}.")
    return "\n".join(lines)


def _factors(number: int) -> Iterator[tuple[int, int]]:
    prime = 2
    while number > 1:
        power = 0
        while number % prime == 0:
            number, power = number // prime, power + 1
        if power:
            yield prime, power
        prime = prime + 1 if prime * prime <= number else max(number, prime + 1)


def modular_power(draw: Draw) -> str:
    """A power modulo a number, by repeated squaring."""
    modulus, exponent = draw.between(7, 97), draw.between(9, 120)
    value = draw.between(2, modulus - 1)
    lines = [f"Find the remainder of {value}^{exponent} on division by {modulus}."]
    power, result, used = value, 1, []
    bits = exponent.bit_length()
    for bit in range(bits):
        if bit:
            square = power * power
            start = f"{value}^{2**bit} ≡ {power}^2" if bit > 1 else f"{value}^2"
            lines.append(f"{start} = {square} ≡ {square % modulus} (mod {modulus})")
            power = square % modulus
        if exponent >> bit & 1:
            used.append((2**bit, power))
            result = result * power % modulus
    exponents = " + ".join(str(part) for part, _ in used)
    factors = " · ".join(str(part) for _, part in used)
    lines.append(f"Since {exponent} = {exponents}, we get {value}^{exponent} ≡ {factors} ≡ {result} (mod {modulus}).")
    return "\n".join(lines)


def modular_inverse(draw: Draw) -> str:
    """A linear congruence solved by an inverse, in LaTeX."""
    modulus = draw.choose((11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53))
    value, right = draw.between(2, modulus - 1), draw.between(1, modulus - 1)
    inverse = pow(value, -1, modulus)
    solution = inverse * right % modulus
    return "\n".join(
        (
            rf"Solve the congruence $ {value}z \equiv {right} \pmod{{{modulus}}} $.",
            rf"An inverse of {value} is {inverse}, because ${value} \cdot {inverse} = {value * inverse} "
            rf"\equiv 1 \pmod{{{modulus}}}$.",
            rf"Multiplying both sides by it, $z \equiv {inverse} \cdot {right} = {inverse * right}$, and "
            rf"${inverse * right} \equiv {solution} \pmod{{{modulus}}}$.",
            rf"Indeed ${value} \cdot {solution} = {value * solution} \equiv {right} \pmod{{{modulus}}}$.",
        )
    )
