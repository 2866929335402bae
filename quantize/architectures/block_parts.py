"""The tensors that families have in common."""

from __future__ import annotations

from qtool.quantize.architectures.architecture import Flag, Symbol, TensorTemplate


def linear(name: str, shape: tuple[Symbol, Symbol], gguf: str = "", *, rotary_rows: bool = False) -> TensorTemplate:
    """A weight matrix."""
    return TensorTemplate(name=f"{name}.weight", shape=shape, gguf=gguf and f"{gguf}.weight", rotary_rows=rotary_rows)


def bias(
    name: str, size: Symbol, gguf: str = "", needs: Flag | None = None, *, rotary_rows: bool = False
) -> TensorTemplate:
    """A bias vector."""
    return TensorTemplate(
        name=f"{name}.bias", shape=(size,), gguf=gguf and f"{gguf}.bias", needs=needs, rotary_rows=rotary_rows
    )


def norm(name: str, size: Symbol, gguf: str = "") -> TensorTemplate:
    """A norm's gain."""
    return TensorTemplate(name=f"{name}.weight", shape=(size,), gguf=gguf and f"{gguf}.weight")


OUTER = (
    TensorTemplate(name="model.embed_tokens.weight", shape=("vocab", "hidden"), gguf="token_embd.weight"),
    TensorTemplate(name="model.norm.weight", shape=("hidden",), gguf="output_norm.weight"),
    TensorTemplate(name="lm_head.weight", shape=("vocab", "hidden"), gguf="output.weight", needs="untied"),
)
ATTENTION = (
    norm("input_layernorm", "hidden", "attn_norm"),
    linear("self_attn.q_proj", ("q", "hidden"), "attn_q", rotary_rows=True),
    linear("self_attn.k_proj", ("kv", "hidden"), "attn_k", rotary_rows=True),
    linear("self_attn.v_proj", ("kv", "hidden"), "attn_v"),
    linear("self_attn.o_proj", ("hidden", "q"), "attn_output"),
    norm("post_attention_layernorm", "hidden", "ffn_norm"),
)
MLP = (
    linear("mlp.gate_proj", ("intermediate", "hidden"), "ffn_gate"),
    linear("mlp.up_proj", ("intermediate", "hidden"), "ffn_up"),
    linear("mlp.down_proj", ("hidden", "intermediate"), "ffn_down"),
)
QKV_BIAS = (
    bias("self_attn.q_proj", "q", "attn_q", rotary_rows=True),
    bias("self_attn.k_proj", "kv", "attn_k", rotary_rows=True),
    bias("self_attn.v_proj", "kv", "attn_v"),
)
ATTENTION_BIAS = (
    bias("self_attn.q_proj", "q", "attn_q", "attention_bias", rotary_rows=True),
    bias("self_attn.k_proj", "kv", "attn_k", "attention_bias", rotary_rows=True),
    bias("self_attn.v_proj", "kv", "attn_v", "attention_bias"),
    bias("self_attn.o_proj", "hidden", "attn_output", "attention_bias"),
)
MLP_BIAS = (
    bias("mlp.gate_proj", "intermediate", "ffn_gate", "mlp_bias"),
    bias("mlp.up_proj", "intermediate", "ffn_up", "mlp_bias"),
    bias("mlp.down_proj", "hidden", "ffn_down", "mlp_bias"),
)
HEAD_NORMS = (
    norm("self_attn.q_norm", "head_dim", "attn_q_norm"),
    norm("self_attn.k_norm", "head_dim", "attn_k_norm"),
)
HEAD_NORM_NAMES = ("self_attn.q_norm", "self_attn.k_norm")
