"""The families' data against what transformers builds from the same config."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputRefused
from qtool.quantize.architectures import ARCHITECTURES, architecture_of, block_linears, linear_names, tensor_shapes

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}


def build(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_names_and_shapes_equal_the_network(family: str, tied: bool, biased: bool) -> None:
    flags = dict.fromkeys(ARCHITECTURES[family].flags, biased)
    config = {"model_type": family, "tie_word_embeddings": tied, **SIZES, **flags}
    network = build(config)
    assert tensor_shapes(config) == {name: tuple(p.shape) for name, p in network.named_parameters()}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_linears_in_the_order_they_run(family: str) -> None:
    import torch

    config = {"model_type": family, "tie_word_embeddings": False, **SIZES}
    network = build(config)
    modules = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(linear_names(config)) == sorted(modules)
    assert linear_names(config)[-1] == "lm_head"
    assert linear_names(config)[7:9] == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_group_reads_one_input_and_groups_run_in_order(family: str, tiny_model: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    row = ARCHITECTURES[family]
    network = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    block, seen = network.model.layers[0], {}
    for name in block_linears(row):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.setdefault(name, inputs[0].detach().clone())
        )
    with torch.no_grad():
        network(torch.arange(6)[None])
    assert list(seen) == list(block_linears(row))
    for group in row.linear_groups:
        assert all(torch.equal(seen[group[0]], seen[name]) for name in group)
    firsts = [seen[group[0]] for group in row.linear_groups]
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in pairwise(firsts))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_norms_exist(family: str) -> None:
    row = ARCHITECTURES[family]
    names = {template.name for template in row.block}
    assert {f"{norm}.weight" for norm in (*row.norms, *row.head_norms)} <= names
    assert len({template.gguf for template in row.block}) == len(row.block)


@pytest.mark.parametrize("config", [{}, {"model_type": "gpt_oss"}, {"model_type": None}, {"model_type": ["llama"]}])
def test_an_unknown_family_lists_the_known_ones(config: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="supported: llama, mistral, qwen2, qwen3"):
        architecture_of(config)
