"""What an H200 should reach, and what the rows say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from on_gpu.budget import Row


@dataclass(frozen=True)
class Target:
    """The best of some kernels on one shape, in microseconds."""

    text: str
    names: tuple[str, ...]
    k: int
    n: int  # 0 for a kernel of rows
    m: int
    most_us: float


TARGETS = (
    Target("W4A8, M 16, 4096→14336", ("w4a8", "w4a8 g128"), 4096, 14336, 16, 11.5),
    Target("W4A8, M 1, 4096→14336", ("w4a8", "w4a8 g128"), 4096, 14336, 1, 11.5),
    Target("W4A8, M 16, 4096²", ("w4a8", "w4a8 g128"), 4096, 4096, 16, 5.0),
    Target("W4A8, M 64, 4096→6144", ("w4a8", "w4a8 g128"), 4096, 6144, 64, 8.0),
    Target("W4A8, M 64, 14336→4096", ("w4a8", "w4a8 g128"), 14336, 4096, 64, 14.0),
    Target("W4A8, M 16, 8192→28672", ("w4a8", "w4a8 g128"), 8192, 28672, 16, 42.0),
    Target("8 bits, M 16, 4096²", ("w8a8", "fp8", "fp8 fast sums"), 4096, 4096, 16, 6.5),
    Target("8 bits, M 4096, 4096→14336", ("w8a8", "fp8", "fp8 fast sums"), 4096, 14336, 4096, 480.0),
    Target("W4A8, M 4096, 4096→14336", ("w4a8", "w4a8 g128"), 4096, 14336, 4096, 600.0),
    Target("Hadamard + int8, 4096 × 4096", ("Hadamard + int8",), 4096, 0, 4096, 16.0),
)


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """A row for each target: what was reached, None where nothing was timed. By the 20th percentile."""
    found: list[Row] = []
    for target in TARGETS:
        times = {
            row["name"]: row["us"]["p20"]
            for row in rows
            if row["name"] in target.names
            and "us" in row
            and (row["k"], row.get("n", 0), row["m"]) == (target.k, target.n, target.m)
        }
        best = min(times, key=times.__getitem__) if times else None
        found.append(
            {
                "kind": "target",
                "text": target.text,
                "most_us": target.most_us,
                "name": best,
                "us": times[best] if best else None,
                "reached": bool(best) and times[best] <= target.most_us,
            }
        )
    return found
