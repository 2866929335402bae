"""All that makes a graph slow, inexact or unloadable on the CPU provider, without a word from the runtime.

A trap is a function from what is known of a model to at most one `Trap`.
"""

from __future__ import annotations

from collections.abc import Callable

from qtool.runtime.explain import graph_traps, linear_traps
from qtool.runtime.explain.facts import Facts
from qtool.runtime.explain.online import costly_transforms
from qtool.runtime.explain.report import Trap

TRAPS: tuple[Callable[[Facts], Trap | None], ...] = (
    graph_traps.fp8_refused,
    linear_traps.weights_dequantized,
    linear_traps.weights_converted,
    graph_traps.table_dequantized,
    linear_traps.eight_bits_without_level_4,
    linear_traps.unpacked,
    linear_traps.signed_integers,
    linear_traps.wide_activations,
    linear_traps.rounded_twice,
    linear_traps.half_floats,
    graph_traps.no_cache,
    graph_traps.cache_not_in_place,
    graph_traps.all_logits,
    costly_transforms,
    linear_traps.silently_rounded,
    linear_traps.one_scale_for_all,
    linear_traps.unknown_kernels,
)


def find_traps(facts: Facts) -> tuple[Trap, ...]:
    """All that are there, warnings first."""
    found = [trap for look in TRAPS if (trap := look(facts)) is not None]
    return tuple(sorted(found, key=lambda trap: not trap.warning))
