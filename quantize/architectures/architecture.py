"""The record that describes one family. Shapes are symbolic; a config gives the symbols their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Symbol = Literal["vocab", "hidden", "intermediate", "q", "kv", "head_dim"]
Flag = Literal["attention_bias", "mlp_bias", "untied"]

TRUE_SEQUENTIAL: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True, kw_only=True)
class TensorTemplate:
    """One tensor of a family.

    Attributes:
        name: the Hugging Face name; inside a block it follows "model.layers.{index}.".
        shape: its dimensions, outermost first. q is heads × head_dim, kv is kv heads × head_dim.
        gguf: the GGUF name; inside a block it follows "blk.{index}.".
        needs: the tensor exists only when this flag of the config is true ("untied": when the head has weights of
            its own); None means always.
        rotary_rows: its rows are the heads of a rotary projection, which GGUF's "llama" architecture stores with
            each head's even and odd rows interleaved.
    """

    name: str
    shape: tuple[Symbol, ...]
    gguf: str
    needs: Flag | None = None
    rotary_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family of decoder-only models.

    Attributes:
        model_type: config.json's model_type.
        head_class: the class that config.json's `architectures` must name, when it names any.
        block: the tensors of one decoder block.
        outer: the tensors outside the blocks.
        norms: the block's norms that feed linears, in order: (before attention, before the MLP).
        head_norms: norms over head_dim, applied to queries and keys.
        linear_groups: the block's linears in the order they run; a group reads one input.
        gguf_architectures: values of GGUF's general.architecture that mean this family.
        kv_heads_default: what an absent num_key_value_heads means; None: as many as there are heads.
        head_dim_default: what an absent head_dim means; None: hidden_size / num_attention_heads.
        context_default: what an absent max_position_embeddings means.
        windowed: every block attends through config.json's sliding_window.
        window_default: what an absent sliding_window means, for a windowed family.
        flags: the bias switches config.json may turn on.
    """

    model_type: str
    head_class: str
    block: tuple[TensorTemplate, ...]
    outer: tuple[TensorTemplate, ...]
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    linear_groups: tuple[tuple[str, ...], ...] = TRUE_SEQUENTIAL
    gguf_architectures: tuple[str, ...] = ()
    kv_heads_default: int | None = None
    head_dim_default: int | None = None
    context_default: int
    windowed: bool = False
    window_default: int | None = None
    flags: tuple[Flag, ...] = ()
