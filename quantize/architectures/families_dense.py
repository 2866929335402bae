"""Dense attention families with blocks of their own: Gemma 2 and 3, Phi-3, OPT."""

from __future__ import annotations

from dataclasses import replace

from qtool.quantize.architectures.architecture import Architecture, Spine, TensorTemplate
from qtool.quantize.architectures.block_parts import (
    ATTENTION,
    ATTENTION_BIAS,
    HEAD_NORM_NAMES,
    HEAD_NORMS,
    MLP,
    OUTER,
    bias,
    linear,
    norm,
)
from qtool.quantize.architectures.settings import (
    HEADS,
    HIDDEN,
    LAYERS,
    RMS_EPSILON,
    SILU,
    VOCABULARY,
    Choice,
    Fixed,
    Number,
    Rope,
    Setting,
    Size,
    rms_epsilon,
)
from qtool.quantize.architectures.stream import GATED_STREAM, Edge, Stream

_GEMMA_BLOCK = (
    *ATTENTION,
    norm("pre_feedforward_layernorm", "hidden"),
    norm("post_feedforward_layernorm", "hidden"),
    *MLP,
    *ATTENTION_BIAS,
)
_GEMMA_NORMS = ("input_layernorm", "pre_feedforward_layernorm")
_GELU = Choice(
    key="hidden_activation", default="gelu_pytorch_tanh", allowed={"gelu_pytorch_tanh": "gelu_pytorch_tanh"}
)
_GEMMA_SETTINGS: tuple[Setting, ...] = (
    _GELU,
    RMS_EPSILON,
    Size(key="query_pre_attn_scalar", default=256, at_most=2**17),
    Fixed(key="use_bidirectional_attention", value=False, why="is no causal language model"),
)
_PHI3_BLOCK = (
    norm("input_layernorm", "hidden"),
    linear("self_attn.qkv_proj", ("qkv", "hidden")),
    linear("self_attn.o_proj", ("hidden", "q")),
    norm("post_attention_layernorm", "hidden"),
    linear("mlp.gate_up_proj", ("gate_up", "hidden")),
    linear("mlp.down_proj", ("hidden", "intermediate")),
)
_OPT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_OPT_BLOCK = (
    norm("self_attn_layer_norm", "hidden"),
    bias("self_attn_layer_norm", "hidden"),
    *(linear(name, ("hidden", "hidden")) for name in _OPT_ATTENTION),
    *(bias(name, "hidden", needs="enable_bias") for name in _OPT_ATTENTION),
    norm("final_layer_norm", "hidden"),
    bias("final_layer_norm", "hidden"),
    linear("fc1", ("ffn", "hidden")),
    bias("fc1", "ffn", needs="enable_bias"),
    linear("fc2", ("hidden", "ffn")),
    bias("fc2", "hidden", needs="enable_bias"),
)
_GEMMA_STREAM = replace(
    GATED_STREAM, gain_offset=1.0, post_norms=("post_attention_layernorm", "post_feedforward_layernorm")
)
_PHI3_STREAM = Stream(
    readers=(("self_attn.qkv_proj",), ("mlp.gate_up_proj",)),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    values=Edge(writer="self_attn.qkv_proj", reader="self_attn.o_proj", parts=("q", "kv", "kv"), part=2),
    inner=Edge(writer="mlp.gate_up_proj", reader="mlp.down_proj", parts=("intermediate", "intermediate"), part=1),
)
_OPT_STREAM = Stream(
    readers=(_OPT_ATTENTION[:3], ("fc1",)),
    writers=("self_attn.out_proj", "fc2"),
    positions="model.decoder.embed_positions",
    norm="layer",
    values=Edge(writer="self_attn.v_proj", reader="self_attn.out_proj"),
    inner=Edge(writer="fc1", reader="fc2"),  # a positive scale passes through ReLU
)
_OPT_OUTER = (
    TensorTemplate(name="model.decoder.embed_tokens.weight", shape=("vocab", "hidden")),
    TensorTemplate(name="model.decoder.embed_positions.weight", shape=("positions", "hidden")),
    norm("model.decoder.final_layer_norm", "hidden"),
    bias("model.decoder.final_layer_norm", "hidden"),
    TensorTemplate(name="lm_head.weight", shape=("vocab", "hidden"), needs="untied"),
)

DENSE_ROWS = (
    Architecture(
        model_type="gemma2",
        head_class="Gemma2ForCausalLM",
        block=_GEMMA_BLOCK,
        outer=OUTER,
        quantizable=False,
        norms=_GEMMA_NORMS,
        stream=_GEMMA_STREAM,
        kv_heads_default=4,
        head_dim_default=256,
        context_default=8192,
        windowed=True,
        window_default=4096,
        full_every=2,
        settings=(
            *_GEMMA_SETTINGS,
            Number(key="final_logit_softcapping", default=30.0, off_by_null=True, at_most=1e6),
            Number(key="attn_logit_softcapping", default=50.0, off_by_null=True, at_most=1e6),
        ),
        flags=("attention_bias",),
        tied_default=True,
    ),
    Architecture(
        model_type="gemma3_text",
        head_class="Gemma3ForCausalLM",
        block=(*_GEMMA_BLOCK, *HEAD_NORMS),
        outer=OUTER,
        quantizable=False,
        norms=_GEMMA_NORMS,
        stream=_GEMMA_STREAM,
        head_norms=HEAD_NORM_NAMES,
        kv_heads_default=4,
        head_dim_default=256,
        context_default=131072,
        windowed=True,
        window_default=4096,
        full_every=6,
        period_key="sliding_window_pattern",
        rope=Rope(theta=1e6, local_theta=10000.0),
        settings=(
            *_GEMMA_SETTINGS,
            Number(key="final_logit_softcapping", at_most=1e6),
            Number(key="attn_logit_softcapping", at_most=1e6),
        ),
        flags=("attention_bias",),
        tied_default=True,
    ),
    Architecture(
        model_type="phi3",
        head_class="Phi3ForCausalLM",
        block=_PHI3_BLOCK,
        outer=OUTER,
        quantizable=False,
        stream=_PHI3_STREAM,
        linear_groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        context_default=4096,
        windowed=True,
        rope=Rope(types=("default",), partial=True),
        settings=(
            SILU,
            rms_epsilon(1e-5),
            Size(key="original_max_position_embeddings", default=4096, at_most=2**27),
        ),
    ),
    Architecture(
        model_type="opt",
        head_class="OPTForCausalLM",
        block=_OPT_BLOCK,
        outer=_OPT_OUTER,
        spine=Spine(
            embedding="model.decoder.embed_tokens",
            blocks="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
        ),
        quantizable=False,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        stream=_OPT_STREAM,
        linear_groups=(_OPT_ATTENTION[:3], _OPT_ATTENTION[3:], ("fc1",), ("fc2",)),
        attention="positions",
        context_default=2048,
        sizes=(VOCABULARY, HIDDEN, Size(key="ffn_dim", at_most=2**20), LAYERS, HEADS),
        settings=(
            Choice(key="activation_function", default="relu", allowed={"relu": "relu"}),
            Fixed(key="do_layer_norm_before", value=True, why="norms after attention and MLP are not supported"),
            Fixed(key="_remove_final_layer_norm", value=False, why="a network without its final norm is not supported"),
            Fixed(key="layer_norm_elementwise_affine", value=True, why="norms without weights are not supported"),
        ),
        flags=("enable_bias",),
        flags_on=("enable_bias",),
        tied_default=True,
    ),
)
