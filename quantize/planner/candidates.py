"""What may be done to one site: the asked-for rule with some fields changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.rule import Assignment, Rule
from qtool.quantize.artifacts.scheme import PRESETS

AS_ASKED = "as asked"
FINEST_GROUP = 32  # of weights; at 16 a 4-bit weight costs 5 bits
NARROWEST_BLOCK = 16  # of the Hadamard that every transform ends in


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


# Where the rule asked for has a transform or a correction itself.
_PLAIN = Candidate(name="plain", fields={"transform": None, "low_rank": 0})
_HADAMARD = Candidate(name="hadamard", fields={"transform": "hadamard"})
# By the bits of the activations: the fewer, the more directions are worth keeping.
_BY_ACTIVATION: Mapping[int, tuple[Candidate, ...]] = {
    4: (_PLAIN, _HADAMARD, *_quad(8, 16, 32, 64)),
    8: (_PLAIN, _HADAMARD, *_quad(8, 16, 32)),
    16: (_PLAIN, *(Candidate(name=f"low rank {r}", fields={"low_rank": r}) for r in (8, 16, 32))),
}
_OTHER_QUANTIZER = {"gptq": "rtn", "rtn": "gptq", "autoround": "gptq"}


def candidates(asked: Recipe, *, widths: Collection[int] = (), mixed: bool = False) -> tuple[Candidate, ...]:
    """What is worth trying where the recipe's first rule was asked for; the first is the rule itself.

    Args:
        asked: the recipe.
        widths: K of the linears that are planned; a transform that one of them cannot have is left out.
        mixed: also try the rule in 8 bits, and with groups of half the size.
    """
    rule = asked.rules[0]
    given = rule.layer_scheme().input
    offered = _BY_ACTIVATION[16 if given is None else given.format.bits]
    # A search of smoothing scales cannot follow directions, which would change with every scale that it tries.
    searches = "smooth" in asked.model and asked.smooth_search != "smoothquant"
    found = [Candidate(name=AS_ASKED)]
    for candidate in offered:
        fields = candidate.fields
        unsearched = searches and fields.get("transform") == "quad"
        if not _same(rule, fields) and not unsearched and all(_fits(fields, width) for width in widths):
            found.append(candidate)
    found.extend(_uncorrected(rule, found))
    other = _OTHER_QUANTIZER[rule.quantizer]
    rounded = tuple(Candidate(name=f"{c.name}, {other}", fields={**c.fields, "quantizer": other}) for c in found)
    return (*found, *rounded, *((*_finer_groups(rule, found), *_eight_bits(rule)) if mixed else ()))


def _same(rule: Rule, fields: Mapping[str, Any]) -> bool:
    """Whether the rule has these fields already."""
    return all(getattr(rule, name) == value for name, value in fields.items())


def _fits(fields: Mapping[str, Any], width: int) -> bool:
    return fields.get("transform") is None or (width % NARROWEST_BLOCK == 0 and fields.get("rank", 0) <= width)


def _uncorrected(asked: Rule, found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Where a low-rank correction was asked for: every transform without it, so that it has to earn its bits."""
    if not asked.low_rank:
        return ()
    return tuple(
        Candidate(name=f"{candidate.name}, no low rank", fields={**candidate.fields, "low_rank": 0})
        for candidate in found
        if "low_rank" not in candidate.fields and candidate.fields.get("transform", asked.transform)
    )


def _finer_groups(asked: Rule, found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    group = group_size_of(asked.layer_scheme().weight.granularity)
    if group is None or group <= FINEST_GROUP:
        return ()
    half = group // 2
    return tuple(
        Candidate(name=f"{candidate.name}, groups of {half}", fields={**candidate.fields, "group_size": half})
        for candidate in found
    )


def _eight_bits(asked: Rule) -> tuple[Candidate, ...]:
    if asked.layer_scheme().weight.format.bits == 8:
        return ()
    preset = PRESETS[asked.scheme]
    shared = {"group_size": asked.group_size or preset.group_size or "channel", **_FOUR_BITS_ALONE}
    if asked.layer_scheme().input is None:
        return (Candidate(name="W8A16", fields={"scheme": "W8A16", **shared}),)
    activation = asked.activation or preset.default_activation
    return (Candidate(name="W8A8", fields={"scheme": "W8A8", "activation": activation, **shared}),)


# Fields of Rule that only schemes with 4-bit weights or activations have, or have a use for.
_FOUR_BITS_ALONE: Mapping[str, Any] = {"activation_clip": None, "runtime_smooth": None, "scale": None, "low_rank": 0}


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
