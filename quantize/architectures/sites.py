"""Where a family's activations are measured, as data: one table of sites for the blocks of each family.

A site's name follows its block's name ("model.layers.3."). Sites stand in the order of data flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# What a site is to a quantizer: the residual stream; what a GEMM reads; what the KV cache or the SSM state keeps;
# anything else that a module hands out.
Role = Literal["stream", "input", "cache", "output"]
# Where the values are taken: what a module reads or hands out; what attention is given after rotary positions; what
# a state-space mixer computes between its linears.
Tap = Literal["input", "output", "query", "key", "x", "B", "C", "state"]


@dataclass(frozen=True, kw_only=True)
class SiteTemplate:
    """One site of a block.

    Attributes:
        name: after the block's prefix.
        module: the module that is tapped, relative to the block; with "{expert}" one site for each expert.
        tap: where at that module.
        role: what the site is to a quantizer.
        aliases: other names of the same values.
        parts: when the tapped tensor is several side by side: the sizes of all of them, as symbols of the family.
        part: which of `parts` this site is.
        heads_first: the tapped tensor is [b, heads, T, head_dim], not [b, T, …].
    """

    name: str
    module: str
    tap: Tap
    role: Role
    aliases: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    part: int = 0
    heads_first: bool = False


def _in(module: str, *also: str) -> SiteTemplate:
    aliases = tuple(f"{name}.input" for name in also)
    return SiteTemplate(name=f"{module}.input", module=module, tap="input", role="input", aliases=aliases)


def _out(module: str, role: Role = "output") -> SiteTemplate:
    return SiteTemplate(name=f"{module}.output", module=module, tap="output", role=role)


def _parts(module: str, sizes: tuple[str, ...], *names: tuple[str, Role]) -> tuple[SiteTemplate, ...]:
    return tuple(
        SiteTemplate(name=name, module=module, tap="output", role=role, parts=sizes, part=part)
        for part, (name, role) in enumerate(names)
    )


def _rope(attention: str = "self_attn") -> tuple[SiteTemplate, ...]:
    return (
        SiteTemplate(name=f"{attention}.q_rope", module=attention, tap="query", role="output"),
        SiteTemplate(name=f"{attention}.k_rope", module=attention, tap="key", role="cache"),
    )


_QKV = (
    _in("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    _out("self_attn.q_proj"),
    _out("self_attn.k_proj"),
    _out("self_attn.v_proj", "cache"),
)
_HEAD_NORMS = (_out("self_attn.q_norm"), _out("self_attn.k_norm"))
_O = (_in("self_attn.o_proj"), _out("self_attn.o_proj"))
_GATED = (
    _in("mlp.gate_proj", "mlp.up_proj"),
    _out("mlp.gate_proj"),
    _out("mlp.act_fn"),
    _out("mlp.up_proj"),
    _in("mlp.down_proj"),
    _out("mlp.down_proj"),
)
_AFTER_ATTENTION, _AFTER_MLP = _out("post_attention_layernorm"), _out("post_feedforward_layernorm")


def _mixture(router: str, *groups: tuple[str, ...]) -> tuple[SiteTemplate, ...]:
    """Router input and logits, what each expert's linears read, and the sum of the experts."""
    logits = SiteTemplate(name=f"{router}.logits", module=router, tap="output", role="output")
    experts = (_in(*(f"mlp.experts.{{expert}}.{linear}" for linear in group)) for group in groups)
    return (_in(router), logits, *experts, _out("mlp"))


_PAIR = (("gate_proj", "up_proj"), ("down_proj",))

LLAMA = (*_QKV, *_rope(), *_O, *_GATED)
QWEN3 = (*_QKV, *_HEAD_NORMS, *_rope(), *_O, *_GATED)
GEMMA2 = (*_QKV, *_rope(), *_O, _AFTER_ATTENTION, *_GATED, _AFTER_MLP)
_NORMED_HEADS = tuple(replace(site, heads_first=True) for site in _HEAD_NORMS)
GEMMA3 = (*_QKV, *_NORMED_HEADS, *_rope(), *_O, _AFTER_ATTENTION, *_GATED, _AFTER_MLP)
QWEN3_MOE = (*_QKV, *_HEAD_NORMS, *_rope(), *_O, *_mixture("mlp.gate", *_PAIR))
MIXTRAL = (*_QKV, *_rope(), *_O, *_mixture("mlp.gate", *_PAIR))
GPT_OSS = (*_QKV, *_rope(), *_O, *_mixture("mlp.router", ("gate_up_proj",), ("down_proj",)))
PHI3 = (
    _in("self_attn.qkv_proj"),
    *_parts(
        "self_attn.qkv_proj",
        ("q", "kv", "kv"),
        ("self_attn.q_proj.output", "output"),
        ("self_attn.k_proj.output", "output"),
        ("self_attn.v_proj.output", "cache"),
    ),
    *_rope(),
    *_O,
    _in("mlp.gate_up_proj"),
    *_parts(
        "mlp.gate_up_proj",
        ("intermediate", "intermediate"),
        ("mlp.gate_proj.output", "output"),
        ("mlp.up_proj.output", "output"),
    ),
    _out("mlp.activation_fn"),
    _in("mlp.down_proj"),
    _out("mlp.down_proj"),
)
OPT = (
    _in("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    _out("self_attn.q_proj"),
    _out("self_attn.k_proj", "cache"),
    _out("self_attn.v_proj", "cache"),
    _in("self_attn.out_proj"),
    _out("self_attn.out_proj"),
    _in("fc1"),
    _out("fc1"),
    replace(_in("fc2"), aliases=("activation_fn.output",)),
    _out("fc2"),
)
MAMBA = (
    _in("mixer.in_proj"),
    *_parts("mixer.in_proj", ("inner", "inner"), ("mixer.in_proj.x", "output"), ("mixer.in_proj.gate", "output")),
    replace(_in("mixer.x_proj"), aliases=("mixer.x",)),
    *_parts(
        "mixer.x_proj",
        ("time_step", "state", "state"),
        ("mixer.dt", "output"),
        ("mixer.B", "output"),
        ("mixer.C", "output"),
    ),
    SiteTemplate(name="mixer.state", module="mixer", tap="state", role="cache"),
    _in("mixer.out_proj"),
    _out("mixer.out_proj"),
)
MAMBA2 = (
    _in("mixer.in_proj"),
    *_parts(
        "mixer.in_proj",
        ("inner", "conv", "ssm_heads"),
        ("mixer.in_proj.gate", "output"),
        ("mixer.in_proj.xBC", "output"),
        ("mixer.dt", "output"),
    ),
    SiteTemplate(name="mixer.x", module="mixer", tap="x", role="input"),
    SiteTemplate(name="mixer.B", module="mixer", tap="B", role="output"),
    SiteTemplate(name="mixer.C", module="mixer", tap="C", role="output"),
    SiteTemplate(name="mixer.state", module="mixer", tap="state", role="cache"),
    _in("mixer.out_proj"),
    _out("mixer.out_proj"),
)

# By model_type.
SITES: Mapping[str, tuple[SiteTemplate, ...]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "opt": OPT,
    "gpt_oss": GPT_OSS,
    "mamba": MAMBA,
    "mamba2": MAMBA2,
}
