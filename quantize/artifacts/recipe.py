"""The recipe: which linear gets which scheme and quantizer, as ordered rules.

The last rule that matches a module's name wins; `ignore` wins over every rule. Patterns are exact module names,
`*`-wildcards, or regular expressions behind the prefix `re:` (matched against the whole name).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from qtool.errors import UsageError, nearest
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.distillation import Distillation
from qtool.quantize.artifacts.rule import QUANTIZERS, Assignment, QuantizerOptions, Rule, Strict
from qtool.quantize.artifacts.scheme import LIVE_SMOOTH, PRESETS

RECIPE_VERSION = 1
HEAD, FLOAT = "lm_head", "float"


class Recipe(Strict):
    """The whole recipe, validated. `Recipe.from_data` is the one way in.

    `token_weights` is how much each calibration token counts in the second moments that quantizers and transforms work
    with: all the same ("uniform"), or as much as the model's output minds an error there ("gradient").
    `model` lists transforms of the whole model that leave its function as it is and cost nothing online, in order;
    `smooth_search` is how "smooth" finds its factors: "smoothquant" with the exponent `smooth_alpha` for all sites, or
    "aqas" and "awq", which search an exponent for every site. `kv` is what the key-value cache stores; None: floats.
    `distill` trains scales and side products on the whole model when all else is done; None: not.
    """

    version: Literal[1] = 1
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: tuple[Literal["fold_norms", "rotate", "smooth"], ...] = ()
    smooth_alpha: float = Field(default=0.5, ge=0, le=1)
    smooth_search: Literal["smoothquant", "aqas", "awq"] = "smoothquant"
    token_weights: Literal["uniform", "gradient"] = "uniform"
    ignore: tuple[str, ...] = ()
    kv: CacheScheme | None = None
    distill: Distillation | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)

    @field_validator("model", "ignore", "rules", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @staticmethod
    def from_data(data: object, *, name: str = "recipe") -> Recipe:
        """Validate plain data (parsed YAML or built in code).

        Raises:
            UsageError: naming the field; an unknown key is answered with the nearest known one.
        """
        if not isinstance(data, dict):
            raise UsageError(name, "is not a mapping", "see docs/formats.md for an example")
        if isinstance(data.get("version"), int) and data["version"] > RECIPE_VERSION:
            raise UsageError(f"{name}: version {data['version']}", "made for a newer qtool", "upgrade qtool")
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            raise _usage_error(name, error) from None
        for rule in recipe.rules:
            if rule.quantizer not in QUANTIZERS:
                what = f"{name}: quantizer {rule.quantizer!r}"
                raise UsageError(what, "unknown", nearest(rule.quantizer, QUANTIZERS))
            rule.layer_scheme()
            for pattern in rule.patterns:
                compile_pattern(pattern)
        for pattern in recipe.ignore:
            compile_pattern(pattern)
        if recipe.kv is not None:
            recipe.kv.check()
        return recipe

    @staticmethod
    def preset(
        scheme: str,
        *,
        quantizer: str = "gptq",
        ignore: Iterable[str] = (),
        seed: int = 0,
        lm_head: str | None = None,
        model: Iterable[str] = (),
        smooth_alpha: float = 0.5,
        smooth_search: str = "smoothquant",
        token_weights: str = "uniform",
        kv: Mapping[str, Any] | None = None,
        distill: Mapping[str, Any] | None = None,
        **rule: Any,
    ) -> Recipe:
        """The recipe behind `--scheme`: one rule for all linears, and one for the head where it gets its own scheme.

        Args:
            scheme: a key of PRESETS.
            quantizer, ignore, seed, model, smooth_alpha, smooth_search, token_weights, kv, distill: as in the recipe.
            lm_head: the head's scheme, or "float"; None takes the preset's own.
            rule: more fields of Rule, for both rules. The head shares the others' group size and activation, which
                a target computes alike for all linears; transforms and corrections are the blocks' alone.
        """
        if scheme not in PRESETS:
            raise UsageError(f"scheme {scheme!r}", "unknown", nearest(scheme, PRESETS))
        head = lm_head or PRESETS[scheme].lm_head or FLOAT
        common = {"quantizer": quantizer, **rule}
        rules = [{"match": "*", "scheme": scheme, **common}]
        if head not in (FLOAT, scheme):
            preset = PRESETS[scheme]
            activation = rule.get("activation") or preset.default_activation
            shared = {
                "group_size": rule.get("group_size") or preset.group_size or "channel",
                "activation": activation if head not in PRESETS or PRESETS[head].activation else None,
            }
            rules.append({"match": HEAD, "scheme": head, **common, **shared, **_NO_TRANSFORM})
        kept = [*ignore, *([HEAD] if head == FLOAT else [])]
        smooth = {"smooth_alpha": smooth_alpha, "smooth_search": smooth_search}
        whole = {"seed": seed, "model": list(model), **smooth, "token_weights": token_weights}
        whole |= {"ignore": kept, "kv": kv, "distill": distill}
        return Recipe.from_data({**whole, "rules": rules})

    def to_data(self) -> dict[str, Any]:
        """Plain data that `from_data` reads back equal."""
        data: dict[str, Any] = json.loads(self.model_dump_json())
        return data

    @property
    def digest(self) -> str:
        """sha256 (hex) of the normalised recipe."""
        return hashlib.sha256(json.dumps(self.to_data(), sort_keys=True).encode()).hexdigest()

    def assign(self, modules: Iterable[str]) -> dict[str, Assignment]:
        """Decide for every linear, in the order given.

        Raises:
            UsageError: when a pattern matches nothing, or when nothing at all, not even the cache, would be quantized.
        """
        names = list(modules)
        used: set[str] = set()
        decided = {name: self._decide(name, used) for name in names}
        patterns = [*self.ignore, *(p for rule in self.rules for p in rule.patterns)]
        idle = [p for p in patterns if p not in used and not any(compile_pattern(p)(n) for n in names)]
        if idle:
            raise UsageError(f"recipe pattern {idle[0]!r}", "matches no linear of this model", nearest(idle[0], names))
        if self.kv is None and all(a.scheme is None for a in decided.values()):
            raise UsageError("recipe", "quantizes no linear of this model", "widen a rule's match or shorten ignore")
        return decided

    def _decide(self, name: str, used: set[str]) -> Assignment:
        for pattern in self.ignore:
            if compile_pattern(pattern)(name):
                used.add(pattern)
                return Assignment(module=name, scheme=None, reason=f"ignored by {pattern!r}")
        for rule in reversed(self.rules):
            hits = [p for p in rule.patterns if compile_pattern(p)(name)]
            if hits:
                used.update(hits)
                if ".experts." in name and rule.runtime_smooth in LIVE_SMOOTH:
                    why = "reads tokens of several requests at once, so none has factors of its own"
                    raise UsageError(f"{name}: runtime_smooth", why, "give it a rule with runtime_smooth: frozen")
                return Assignment(
                    module=name,
                    scheme=rule.layer_scheme(),
                    transform=rule.transform_choice(),
                    frozen_smooth=rule.runtime_smooth == "frozen",
                    low_rank=rule.low_rank,
                    quantizer=rule.quantizer,
                    options=rule.options,
                )
        return Assignment(module=name, scheme=None, reason="no rule matches")


_NO_TRANSFORM: Mapping[str, Any] = {
    "transform": None,
    "low_rank": 0,
    "activation_clip": None,
    "runtime_smooth": None,
    "scale": None,
}


def compile_pattern(pattern: str) -> Any:
    """A predicate for module names; raises UsageError for a broken regular expression."""
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        return re.compile(pattern[3:]).fullmatch
    except re.error as error:
        raise UsageError(f"recipe pattern {pattern!r}", f"not a regular expression ({error})", "fix it") from None


_MODELS: Mapping[str, type[BaseModel]] = {
    "rules": Rule,
    "options": QuantizerOptions,
    "kv": CacheScheme,
    "distill": Distillation,
}


def _usage_error(name: str, error: ValidationError) -> UsageError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        parents = [str(part) for part in first["loc"][:-1] if not isinstance(part, int)]
        model = _MODELS[parents[-1]] if parents else Recipe
        return UsageError(f"{name}: {where}", "unknown key", nearest(str(first["loc"][-1]), model.model_fields))
    if first["type"] == "missing":
        return UsageError(f"{name}: {where}", "missing", "add it")
    remedy = nearest(str(first["input"]), PRESETS) if where.endswith("scheme") else "see docs/formats.md"
    return UsageError(f"{name}: {where} = {first['input']!r}", first["msg"], remedy)
