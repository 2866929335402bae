"""Families whose MLP is a list of experts of which a router chooses a few for each token.

Checkpoints name and pack experts differently; the network of qtool has one linear per expert, and `Stored` says where
its weights lie.
"""

from __future__ import annotations

from qtool.quantize.architectures.architecture import Architecture, Stored, Symbol, TensorTemplate
from qtool.quantize.architectures.block_parts import (
    ATTENTION,
    ATTENTION_BIAS,
    HEAD_NORM_NAMES,
    HEAD_NORMS,
    OUTER,
)
from qtool.quantize.architectures.settings import RMS_EPSILON, SILU, Fixed, Rope, Size, Switch, rms_epsilon
from qtool.quantize.architectures.stream import QKV, VALUES, Edge, Stream

_ATTENTION_GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_EACH = "mlp.experts.{expert}"
_GATED = (("gate_proj", "up_proj"), ("down_proj",))
_GATED_STREAM = Stream(
    readers=(QKV, ("mlp.gate", f"{_EACH}.gate_proj", f"{_EACH}.up_proj")),
    writers=("self_attn.o_proj", f"{_EACH}.down_proj"),
    values=VALUES,
    inner=Edge(writer=f"{_EACH}.up_proj", reader=f"{_EACH}.down_proj"),
)
# The middle of an expert is clamped and shifted: no scale passes.
_GPT_OSS_STREAM = Stream(
    readers=(QKV, ("mlp.router", f"{_EACH}.gate_up_proj")),
    writers=("self_attn.o_proj", f"{_EACH}.down_proj"),
    values=VALUES,
)
_MAX_EXPERTS = 2**14


def _expert(name: str, shape: tuple[Symbol, Symbol], *stored: Stored) -> TensorTemplate:
    return TensorTemplate(name=f"{_EACH}.{name}.weight", shape=shape, stored=stored)


def _gated_experts(intermediate: Symbol, names: tuple[str, str, str] | None = None) -> tuple[TensorTemplate, ...]:
    """Three linears for each expert; also read from the packed form that transformers 5 may save, and under `names`
    (gate, up, down), the original checkpoint's."""
    gate, up, down = [(Stored(name=name),) for name in names] if names else [(), (), ()]
    packed = "mlp.experts.gate_up_proj"
    return (
        _expert("gate_proj", (intermediate, "hidden"), *gate, Stored(name=packed, half=0)),
        _expert("up_proj", (intermediate, "hidden"), *up, Stored(name=packed, half=1)),
        _expert("down_proj", ("hidden", intermediate), *down, Stored(name="mlp.experts.down_proj")),
    )


_MIXTRAL_EACH = "block_sparse_moe.experts.{expert}"
_GPT_OSS_EXPERTS = (
    _expert("gate_up_proj", ("gate_up", "hidden"), Stored(name="mlp.experts.gate_up_proj", transposed=True)),
    TensorTemplate(
        name=f"{_EACH}.gate_up_proj.bias", shape=("gate_up",), stored=(Stored(name="mlp.experts.gate_up_proj_bias"),)
    ),
    _expert("down_proj", ("hidden", "intermediate"), Stored(name="mlp.experts.down_proj", transposed=True)),
    TensorTemplate(
        name=f"{_EACH}.down_proj.bias", shape=("hidden",), stored=(Stored(name="mlp.experts.down_proj_bias"),)
    ),
)


def _router(name: str, *stored: Stored) -> TensorTemplate:
    return TensorTemplate(name=f"{name}.weight", shape=("experts", "hidden"), stored=stored)


EXPERT_ROWS = (
    Architecture(
        model_type="qwen3_moe",
        head_class="Qwen3MoeForCausalLM",
        block=(*ATTENTION, *HEAD_NORMS, *ATTENTION_BIAS, _router("mlp.gate"), *_gated_experts("moe_intermediate")),
        outer=OUTER,
        quantizable=False,
        head_norms=HEAD_NORM_NAMES,
        linear_groups=_ATTENTION_GROUPS,
        experts="mlp.experts",
        router="mlp.gate",
        expert_groups=_GATED,
        stream=_GATED_STREAM,
        experts_key="num_experts",
        kv_heads_default=4,
        context_default=32768,
        settings=(
            SILU,
            RMS_EPSILON,
            Size(key="num_experts", default=128, at_most=_MAX_EXPERTS, other_names=("num_local_experts",)),
            Size(key="num_experts_per_tok", default=8, at_most=_MAX_EXPERTS),
            Size(key="moe_intermediate_size", default=768, at_most=2**20),
            Switch(key="norm_topk_prob", default=False),
            Fixed(key="decoder_sparse_step", value=1, why="blocks without experts are not supported"),
            Fixed(key="mlp_only_layers", value=[], why="blocks without experts are not supported"),
        ),
        flags=("attention_bias",),
    ),
    Architecture(
        model_type="mixtral",
        head_class="MixtralForCausalLM",
        block=(
            *ATTENTION,
            _router("mlp.gate", Stored(name="block_sparse_moe.gate.weight")),
            *_gated_experts(
                "intermediate",
                (f"{_MIXTRAL_EACH}.w1.weight", f"{_MIXTRAL_EACH}.w3.weight", f"{_MIXTRAL_EACH}.w2.weight"),
            ),
        ),
        outer=OUTER,
        quantizable=False,
        linear_groups=_ATTENTION_GROUPS,
        experts="mlp.experts",
        router="mlp.gate",
        expert_groups=_GATED,
        stream=_GATED_STREAM,
        experts_key="num_local_experts",
        kv_heads_default=8,
        context_default=131072,
        windowed=True,
        rope=Rope(theta=1e6),
        settings=(
            SILU,
            rms_epsilon(1e-5),
            Size(key="num_local_experts", default=8, at_most=_MAX_EXPERTS, other_names=("num_experts",)),
            Size(key="num_experts_per_tok", default=2, at_most=_MAX_EXPERTS),
        ),
    ),
    Architecture(
        model_type="gpt_oss",
        head_class="GptOssForCausalLM",
        block=(
            *ATTENTION,
            *ATTENTION_BIAS,
            TensorTemplate(name="self_attn.sinks", shape=("heads",)),
            _router("mlp.router"),
            TensorTemplate(name="mlp.router.bias", shape=("experts",)),
            *_GPT_OSS_EXPERTS,
        ),
        outer=OUTER,
        quantizable=False,
        linear_groups=_ATTENTION_GROUPS,
        experts="mlp.experts",
        router="mlp.router",
        expert_groups=(("gate_up_proj",), ("down_proj",)),
        stream=_GPT_OSS_STREAM,
        experts_key="num_local_experts",
        kv_heads_default=8,
        head_dim_default=64,
        context_default=131072,
        windowed=True,
        window_default=128,
        full_every=2,
        rope=Rope(
            theta=150000.0,
            absent={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
        settings=(
            SILU,
            rms_epsilon(1e-5),
            Size(key="num_local_experts", default=128, at_most=_MAX_EXPERTS, other_names=("num_experts",)),
            Size(key="num_experts_per_tok", default=4, at_most=_MAX_EXPERTS, other_names=("experts_per_token",)),
            Fixed(key="swiglu_alpha", value=1.702, why="older transformers compute with 1.702 whatever it says"),
            Fixed(key="swiglu_limit", value=7.0, why="older transformers compute with 7.0 whatever it says"),
        ),
        flags=("attention_bias",),
        flags_on=("attention_bias",),
        float_remedy="dequantize it to bfloat16 first: load it with Mxfp4Config(dequantize=True) and save it",
        quantized_suffixes=("_blocks", "_scales"),
    ),
)
