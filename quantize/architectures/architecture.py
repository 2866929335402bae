"""The record that describes one family. Shapes are symbolic; a config gives the symbols their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qtool.quantize.architectures.settings import RMS_EPSILON, ROTARY, SILU, SIZES, Rope, Setting, Size
from qtool.quantize.architectures.stream import GATED_STREAM, Stream

Symbol = Literal[
    "vocab", "hidden", "intermediate", "gate_up", "ffn", "positions", "heads", "head_dim", "q", "kv", "qkv",
    "experts", "moe_intermediate",
    "inner", "inner_pair", "mixer_input", "conv", "kernel", "one", "state", "selection", "time_step", "ssm_heads",
]  # fmt: skip
Flag = Literal["attention_bias", "mlp_bias", "enable_bias", "use_bias", "use_conv_bias", "untied"]

TRUE_SEQUENTIAL: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Another place on disk where a tensor may lie.

    Attributes:
        name: as TensorTemplate.name. Where the template has "{expert}" and this name has not, the experts are packed
            into one tensor along its first axis.
        transposed: the matrix is stored as its transpose.
        half: the tensor is this half (0 or 1) of the rows of a matrix that stacks two of its shape.
    """

    name: str
    transposed: bool = False
    half: int | None = None


@dataclass(frozen=True, kw_only=True)
class TensorTemplate:
    """One tensor of a family.

    Attributes:
        name: the name in transformers' network; inside a block it follows the spine's "{blocks}.{index}.". With
            "{expert}" in it there is one such tensor for each expert.
        shape: its dimensions, outermost first. q is heads × head_dim, kv is kv heads × head_dim.
        gguf: the GGUF name; inside a block it follows "blk.{index}."; empty where GGUF is not read.
        needs: the tensor exists only when this flag of the config is true ("untied": when the head has weights of
            its own); None means always.
        rotary_rows: its rows are the heads of a rotary projection, which GGUF's "llama" architecture stores with
            each head's even and odd rows interleaved.
        stored: where checkpoints have it when not under `name`.
    """

    name: str
    shape: tuple[Symbol, ...]
    gguf: str = ""
    needs: Flag | None = None
    rotary_rows: bool = False
    stored: tuple[Stored, ...] = ()

    @property
    def per_expert(self) -> bool:
        """Whether every expert has one."""
        return "{expert}" in self.name


@dataclass(frozen=True, kw_only=True)
class Spine:
    """Names of the modules outside the blocks, and of the list of blocks."""

    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of decoder-only models.

    Attributes:
        model_type: config.json's model_type.
        head_class: the class that config.json's `architectures` must name, when it names any.
        block: the tensors of one decoder block.
        outer: the tensors outside the blocks.
        spine: the modules that hold them.
        quantizable: qtool quantizes and exports it; otherwise it can be opened and measured.
        norms: the block's norms that feed linears, in order: (before attention, before the MLP).
        head_norms: norms over head_dim, applied to queries and keys.
        stream: who reads `norms`, who writes the residual stream, and where a scale may move.
        linear_groups: the block's linears in the order they run, experts left out; a group reads one input.
        uncalled: linears whose weights the network multiplies with itself, so that no hook on the module sees it.
        experts: path of the list of experts in a block; empty without experts.
        router: path of the module that chooses experts.
        expert_groups: as linear_groups, for one expert and relative to it.
        experts_key: the config key with the number of experts.
        gguf_architectures: values of GGUF's general.architecture that mean this family.
        attention: "rotary"; "positions" (learned, added to the embedding); "none" (a state space).
        kv_heads_default: what an absent num_key_value_heads means; None: as many as there are heads.
        head_dim_default: what an absent head_dim means; None: hidden_size / num_attention_heads.
        context_default: what an absent max_position_embeddings means; None: the family has no such limit.
        windowed: blocks attend through config.json's sliding_window; all of them unless `full_every` is set.
        window_default: what an absent sliding_window means, for a windowed family.
        full_every: without layer_types every n-th block attends to everything, the others through the window;
            0: all blocks attend alike.
        period_key: a config key that overrides `full_every`.
        rope: rotary positions.
        sizes: the sizes config.json must have.
        settings: what else decides the network.
        flags: the bias switches config.json may turn on.
        flags_on: those of them that are on unless config.json turns them off.
        tied_default: what an absent tie_word_embeddings means.
        float_remedy: how to get a float model from one that comes quantized.
        quantized_suffixes: endings of tensor names that only a quantized checkpoint has.
    """

    model_type: str
    head_class: str
    block: tuple[TensorTemplate, ...]
    outer: tuple[TensorTemplate, ...]
    spine: Spine = Spine()
    quantizable: bool = True
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    stream: Stream = GATED_STREAM
    linear_groups: tuple[tuple[str, ...], ...] = TRUE_SEQUENTIAL
    uncalled: tuple[str, ...] = ()
    experts: str = ""
    router: str = ""
    expert_groups: tuple[tuple[str, ...], ...] = ()
    experts_key: str = ""
    gguf_architectures: tuple[str, ...] = ()
    attention: Literal["rotary", "positions", "none"] = "rotary"
    kv_heads_default: int | None = None
    head_dim_default: int | None = None
    context_default: int | None
    windowed: bool = False
    window_default: int | None = None
    full_every: int = 0
    period_key: str = ""
    rope: Rope = ROTARY
    sizes: tuple[Size, ...] = SIZES
    settings: tuple[Setting, ...] = (SILU, RMS_EPSILON)
    flags: tuple[Flag, ...] = ()
    flags_on: tuple[Flag, ...] = ()
    tied_default: bool = False
    float_remedy: str = "give the original float model"
    quantized_suffixes: tuple[str, ...] = ()
