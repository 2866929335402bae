"""Mamba and Mamba 2: blocks of one mixer, whose state space takes the place of attention and MLP."""

from __future__ import annotations

from qtool.quantize.architectures.architecture import Architecture, Spine, Stored, TensorTemplate
from qtool.quantize.architectures.block_parts import bias, linear, norm
from qtool.quantize.architectures.settings import (
    HIDDEN,
    LAYERS,
    SILU,
    VOCABULARY,
    Number,
    Range,
    Size,
    Switch,
    rms_epsilon,
)
from qtool.quantize.architectures.stream import Stream

_SPINE = Spine(embedding="backbone.embeddings", blocks="backbone.layers", final_norm="backbone.norm_f")
_OUTER = (
    TensorTemplate(
        name="backbone.embeddings.weight",
        shape=("vocab", "hidden"),
        stored=(Stored(name="backbone.embedding.weight"),),
    ),
    norm("backbone.norm_f", "hidden"),
    TensorTemplate(name="lm_head.weight", shape=("vocab", "hidden"), needs="untied"),
)
_SIZES = (VOCABULARY, HIDDEN, LAYERS)
_COMMON = (
    SILU,
    rms_epsilon(1e-5, "layer_norm_epsilon"),
    Size(key="expand", default=2, at_most=64),
    Size(key="conv_kernel", default=4, at_most=4096),
    Switch(key="residual_in_fp32", default=True),
    Number(key="time_step_min", default=0.001, at_most=1e6),
    Number(key="time_step_max", default=0.1, at_most=1e6),
    Number(key="time_step_floor", default=1e-4, at_most=1e6),
)

STATE_SPACE_ROWS = (
    Architecture(
        model_type="mamba",
        head_class="MambaForCausalLM",
        block=(
            norm("norm", "hidden"),
            linear("mixer.in_proj", ("inner_pair", "hidden")),
            bias("mixer.in_proj", "inner_pair", needs="use_bias"),
            TensorTemplate(name="mixer.conv1d.weight", shape=("inner", "one", "kernel")),
            bias("mixer.conv1d", "inner", needs="use_conv_bias"),
            linear("mixer.x_proj", ("selection", "inner")),
            linear("mixer.dt_proj", ("inner", "time_step")),
            bias("mixer.dt_proj", "inner"),
            TensorTemplate(name="mixer.A_log", shape=("inner", "state")),
            TensorTemplate(name="mixer.D", shape=("inner",)),
            linear("mixer.out_proj", ("hidden", "inner")),
            bias("mixer.out_proj", "hidden", needs="use_bias"),
        ),
        outer=_OUTER,
        spine=_SPINE,
        quantizable=False,
        norms=("norm",),
        stream=Stream(readers=(("mixer.in_proj",),), writers=("mixer.out_proj",)),
        linear_groups=(("mixer.in_proj",), ("mixer.x_proj",), ("mixer.dt_proj",), ("mixer.out_proj",)),
        uncalled=("mixer.dt_proj",),
        attention="none",
        context_default=None,
        sizes=_SIZES,
        settings=(*_COMMON, Size(key="state_size", default=16, at_most=2**14)),
        flags=("use_bias", "use_conv_bias"),
        flags_on=("use_conv_bias",),
        tied_default=True,
    ),
    Architecture(
        model_type="mamba2",
        head_class="Mamba2ForCausalLM",
        block=(
            norm("norm", "hidden"),
            linear("mixer.in_proj", ("mixer_input", "hidden")),
            bias("mixer.in_proj", "mixer_input", needs="use_bias"),
            TensorTemplate(name="mixer.conv1d.weight", shape=("conv", "one", "kernel")),
            bias("mixer.conv1d", "conv", needs="use_conv_bias"),
            TensorTemplate(name="mixer.A_log", shape=("ssm_heads",)),
            TensorTemplate(name="mixer.D", shape=("ssm_heads",)),
            TensorTemplate(name="mixer.dt_bias", shape=("ssm_heads",)),
            norm("mixer.norm", "inner"),
            linear("mixer.out_proj", ("hidden", "inner")),
            bias("mixer.out_proj", "hidden", needs="use_bias"),
        ),
        outer=_OUTER,
        spine=_SPINE,
        quantizable=False,
        norms=("norm", "mixer.norm"),
        stream=Stream(readers=(("mixer.in_proj",), ()), writers=("mixer.out_proj",)),
        linear_groups=(("mixer.in_proj",), ("mixer.out_proj",)),
        attention="none",
        context_default=None,
        sizes=_SIZES,
        settings=(
            *_COMMON,
            Size(key="state_size", default=128, at_most=2**14),
            Size(key="num_heads", default=128, at_most=2**14),
            Size(key="head_dim", default=64, at_most=2**13),
            Size(key="n_groups", default=8, at_most=2**14),
            Size(key="chunk_size", default=256, at_most=2**20),
            Range(key="time_step_limit", default=(0.0, float("inf"))),
        ),
        flags=("use_bias", "use_conv_bias"),
        flags_on=("use_conv_bias",),
    ),
)
