"""Llama and the families that share its block: one attention, one gated MLP, two norms before them."""

from __future__ import annotations

from qtool.quantize.architectures.architecture import Architecture
from qtool.quantize.architectures.block_parts import (
    ATTENTION,
    ATTENTION_BIAS,
    HEAD_NORM_NAMES,
    HEAD_NORMS,
    MLP,
    MLP_BIAS,
    OUTER,
    QKV_BIAS,
)

LLAMA_ROWS = (
    Architecture(
        model_type="llama",
        head_class="LlamaForCausalLM",
        block=ATTENTION + MLP + ATTENTION_BIAS + MLP_BIAS,
        outer=OUTER,
        gguf_architectures=("llama",),
        context_default=2048,
        flags=("attention_bias", "mlp_bias"),
    ),
    Architecture(
        model_type="mistral",
        head_class="MistralForCausalLM",
        block=ATTENTION + MLP,
        outer=OUTER,
        kv_heads_default=8,
        context_default=131072,
        windowed=True,
        window_default=4096,
    ),
    Architecture(
        model_type="qwen2",
        head_class="Qwen2ForCausalLM",
        block=ATTENTION + MLP + QKV_BIAS,
        outer=OUTER,
        gguf_architectures=("qwen2",),
        kv_heads_default=32,
        context_default=32768,
    ),
    Architecture(
        model_type="qwen3",
        head_class="Qwen3ForCausalLM",
        block=ATTENTION + MLP + HEAD_NORMS + ATTENTION_BIAS,
        outer=OUTER,
        head_norms=HEAD_NORM_NAMES,
        gguf_architectures=("qwen3",),
        kv_heads_default=32,
        head_dim_default=128,
        context_default=32768,
        flags=("attention_bias",),
    ),
)
