"""What may be done to one site: the asked-for rule with some fields changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.rule import Assignment, Rule
from qtool.quantize.artifacts.scheme import PRESETS

AS_ASKED = "as asked"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to treat a site.

    Attributes:
        name: as it is printed.
        fields: of Rule, in place of the asked-for rule's.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def _quad(*ranks: int) -> tuple[Candidate, ...]:
    return tuple(Candidate(name=f"quad {r}", fields={"transform": "quad", "rank": r}) for r in ranks)


_PLAIN = Candidate(name=AS_ASKED)
_HADAMARD = Candidate(name="hadamard", fields={"transform": "hadamard"})
# By the bits of the activations: the fewer, the more directions are worth keeping.
_BY_ACTIVATION: Mapping[int, tuple[Candidate, ...]] = {
    4: (_PLAIN, _HADAMARD, *_quad(8, 16, 32, 64)),
    8: (_PLAIN, _HADAMARD, *_quad(8, 16, 32)),
    16: (_PLAIN, *(Candidate(name=f"low rank {r}", fields={"low_rank": r}) for r in (8, 16, 32))),
}
# A float format's own exponent takes outliers up; only the largest directions are worth a product of their own.
_FLOAT_ACTIVATION = (_PLAIN, _HADAMARD, *_quad(8))
_OTHER_QUANTIZER = {"gptq": "rtn", "rtn": "gptq", "autoround": "gptq"}


def candidates(asked: Rule, *, mixed: bool = False) -> tuple[Candidate, ...]:
    """What is worth trying where this rule was asked for; the first is the rule itself.

    Args:
        asked: the rule.
        mixed: also try the rule in 8 bits.
    """
    given = asked.layer_scheme().input
    if given is not None and given.format.kind == "float":
        found = _FLOAT_ACTIVATION
    else:
        found = _BY_ACTIVATION[16 if given is None else given.format.bits]
    other = _OTHER_QUANTIZER[asked.quantizer]
    rounded = tuple(Candidate(name=f"{c.name}, {other}", fields={**c.fields, "quantizer": other}) for c in found)
    return (*found, *rounded, *(_eight_bits(asked) if mixed else ()))


def _eight_bits(asked: Rule) -> tuple[Candidate, ...]:
    if asked.layer_scheme().weight.format.bits == 8:
        return ()
    preset = PRESETS[asked.scheme]
    shared = {
        "scheme": "W8A8",
        "group_size": asked.group_size or preset.group_size or "channel",
        "activation": asked.activation or preset.default_activation,
        "activation_clip": None,
    }
    return (Candidate(name="W8A8", fields=shared),)


def assignments_by_candidate(
    asked: Recipe, found: Iterable[Candidate], modules: Iterable[str]
) -> dict[str, dict[str, Assignment]]:
    """What every linear gets under each candidate, by candidate name and module."""
    names = list(modules)
    first, *others = asked.rules
    return {
        candidate.name: asked.model_copy(
            update={"rules": (changed(first, first.patterns, candidate.fields), *others)}
        ).assign(names)
        for candidate in found
    }


def changed(rule: Rule, modules: Iterable[str], fields: Mapping[str, Any]) -> Rule:
    """A rule for these modules with some fields changed, validated."""
    data = rule.model_dump(exclude_unset=True)
    return Rule.model_validate({**data, **fields, "match": tuple(modules)})
