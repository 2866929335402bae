"""The supported families, one value each. Defaults are those of transformers' configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures.architecture import Architecture, Flag, Symbol, TensorTemplate


def _linear(name: str, shape: tuple[Symbol, Symbol], gguf: str, *, rotary_rows: bool = False) -> TensorTemplate:
    return TensorTemplate(name=f"{name}.weight", shape=shape, gguf=f"{gguf}.weight", rotary_rows=rotary_rows)


def _bias(name: str, size: Symbol, gguf: str, needs: Flag | None, *, rotary_rows: bool = False) -> TensorTemplate:
    return TensorTemplate(name=f"{name}.bias", shape=(size,), gguf=f"{gguf}.bias", needs=needs, rotary_rows=rotary_rows)


def _norm(name: str, size: Symbol, gguf: str) -> TensorTemplate:
    return TensorTemplate(name=f"{name}.weight", shape=(size,), gguf=f"{gguf}.weight")


_OUTER = (
    TensorTemplate(name="model.embed_tokens.weight", shape=("vocab", "hidden"), gguf="token_embd.weight"),
    TensorTemplate(name="model.norm.weight", shape=("hidden",), gguf="output_norm.weight"),
    TensorTemplate(name="lm_head.weight", shape=("vocab", "hidden"), gguf="output.weight", needs="untied"),
)
_BLOCK = (
    _norm("input_layernorm", "hidden", "attn_norm"),
    _linear("self_attn.q_proj", ("q", "hidden"), "attn_q", rotary_rows=True),
    _linear("self_attn.k_proj", ("kv", "hidden"), "attn_k", rotary_rows=True),
    _linear("self_attn.v_proj", ("kv", "hidden"), "attn_v"),
    _linear("self_attn.o_proj", ("hidden", "q"), "attn_output"),
    _norm("post_attention_layernorm", "hidden", "ffn_norm"),
    _linear("mlp.gate_proj", ("intermediate", "hidden"), "ffn_gate"),
    _linear("mlp.up_proj", ("intermediate", "hidden"), "ffn_up"),
    _linear("mlp.down_proj", ("hidden", "intermediate"), "ffn_down"),
)
_QKV_BIAS = (
    _bias("self_attn.q_proj", "q", "attn_q", None, rotary_rows=True),
    _bias("self_attn.k_proj", "kv", "attn_k", None, rotary_rows=True),
    _bias("self_attn.v_proj", "kv", "attn_v", None),
)
_ATTENTION_BIAS = (
    _bias("self_attn.q_proj", "q", "attn_q", "attention_bias", rotary_rows=True),
    _bias("self_attn.k_proj", "kv", "attn_k", "attention_bias", rotary_rows=True),
    _bias("self_attn.v_proj", "kv", "attn_v", "attention_bias"),
    _bias("self_attn.o_proj", "hidden", "attn_output", "attention_bias"),
)
_MLP_BIAS = (
    _bias("mlp.gate_proj", "intermediate", "ffn_gate", "mlp_bias"),
    _bias("mlp.up_proj", "intermediate", "ffn_up", "mlp_bias"),
    _bias("mlp.down_proj", "hidden", "ffn_down", "mlp_bias"),
)
_HEAD_NORMS = (
    _norm("self_attn.q_norm", "head_dim", "attn_q_norm"),
    _norm("self_attn.k_norm", "head_dim", "attn_k_norm"),
)

_ROWS = (
    Architecture(
        model_type="llama",
        head_class="LlamaForCausalLM",
        block=_BLOCK + _ATTENTION_BIAS + _MLP_BIAS,
        outer=_OUTER,
        gguf_architectures=("llama",),
        context_default=2048,
        flags=("attention_bias", "mlp_bias"),
    ),
    Architecture(
        model_type="mistral",
        head_class="MistralForCausalLM",
        block=_BLOCK,
        outer=_OUTER,
        kv_heads_default=8,
        context_default=131072,
        windowed=True,
        window_default=4096,
    ),
    Architecture(
        model_type="qwen2",
        head_class="Qwen2ForCausalLM",
        block=_BLOCK + _QKV_BIAS,
        outer=_OUTER,
        gguf_architectures=("qwen2",),
        kv_heads_default=32,
        context_default=32768,
    ),
    Architecture(
        model_type="qwen3",
        head_class="Qwen3ForCausalLM",
        block=_BLOCK + _HEAD_NORMS + _ATTENTION_BIAS,
        outer=_OUTER,
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        gguf_architectures=("qwen3",),
        kv_heads_default=32,
        head_dim_default=128,
        context_default=32768,
        flags=("attention_bias",),
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in _ROWS}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family of this config.

    Raises:
        InputRefused: when the model type is missing or unknown; the message lists what is supported.
    """
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise InputRefused(
            f"config.json: model_type = {model_type!r:.80}",
            "this architecture is not supported",
            f"supported: {', '.join(ARCHITECTURES)}",
        )
    return row
