"""The families' data against what transformers builds from the same config."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputRefused
from qtool.quantize.architectures import (
    ARCHITECTURES,
    architecture_of,
    block_linears,
    expert_count,
    linear_names,
    require_quantizable,
    symbol_sizes,
    tensor_shapes,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_local_experts": 3, "num_experts": 3}
SIZES_OF: dict[str, dict[str, Any]] = {
    "qwen3_moe": SIZES | {key: value for key, value in EXPERTS.items() if key != "num_local_experts"},
    "mixtral": SIZES | {key: value for key, value in EXPERTS.items() if key != "num_experts"},
    "phi3": SIZES | {"pad_token_id": None},
    "gpt_oss": SIZES | {key: value for key, value in EXPERTS.items() if key != "num_experts"},
    "opt": {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    | {"ffn_dim": 96, "max_position_embeddings": 50},
    "mamba": {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    | {"state_size": 5, "conv_kernel": 3, "expand": 3},
    "mamba2": {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    | {"state_size": 5, "conv_kernel": 3, "expand": 3, "num_heads": 12, "head_dim": 16, "n_groups": 4},
}


def build(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_names_and_shapes_equal_the_network(
    family: str, tied: bool, biased: bool, unpacked_parameters: Callable[[Any], dict[str, Any]]
) -> None:
    flags = dict.fromkeys(ARCHITECTURES[family].flags, biased)
    config = {"model_type": family, "tie_word_embeddings": tied, **SIZES_OF.get(family, SIZES), **flags}
    unpacked = unpacked_parameters(build(config))
    assert tensor_shapes(config) == {name: tuple(p.shape) for name, p in unpacked.items()}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_linears_in_the_order_they_run(family: str) -> None:
    import torch

    config = {"model_type": family, "tie_word_embeddings": False, **SIZES_OF.get(family, SIZES)}
    network, row = build(config), ARCHITECTURES[family]
    modules = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    weights = [name for name in tensor_shapes(config) if row.experts and f".{row.experts}." in name]
    experts = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    names = linear_names(config)
    assert sorted(names) == sorted(modules + experts)
    assert names[-1] == "lm_head"
    per_block = (len(names) - 1) // 3
    first = block_linears(row)[0]
    assert [names[i * per_block] for i in range(3)] == [f"{row.spine.blocks}.{i}.{first}" for i in range(3)]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_spine_is_the_networks(family: str) -> None:
    config = {"model_type": family, **SIZES_OF.get(family, SIZES)}
    network, spine = build(config), ARCHITECTURES[family].spine
    assert network.get_submodule(spine.embedding) is network.get_input_embeddings()
    assert network.get_submodule(spine.head) is network.get_output_embeddings()
    assert len(network.get_submodule(spine.blocks)) == 3
    norm = network.get_submodule(spine.final_norm)
    assert "norm" in type(norm).__name__.lower() and norm.weight.shape == (64,)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_and_router_are_where_the_row_says(family: str) -> None:
    config = {"model_type": family, **SIZES_OF[family]}
    row, block = ARCHITECTURES[family], build(config).model.layers[0]
    assert expert_count(config) == 3 == len(block.get_submodule(row.experts).down_proj)
    assert block.get_submodule(row.router).weight.shape == (3, 64)
    assert [name for name in linear_names(config) if ".0.mlp.experts.2." in name] == [
        f"model.layers.0.mlp.experts.2.{name}" for group in row.expert_groups for name in group
    ]


def test_a_dense_family_has_no_experts() -> None:
    assert expert_count({"model_type": "llama", **SIZES}) == 0


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_symbols_have_the_sizes_that_the_network_has(family: str) -> None:
    config = {"model_type": family, **SIZES_OF.get(family, SIZES)}
    row, block = ARCHITECTURES[family], build(config).get_submodule(ARCHITECTURES[family].spine.blocks)[0]
    sizes = symbol_sizes(config, row)
    for template in row.block:
        if template.needs is None and not template.per_expert:
            assert tuple(block.get_parameter(template.name).shape) == tuple(sizes[symbol] for symbol in template.shape)


def test_only_the_llama_families_are_quantized() -> None:
    assert [name for name, row in ARCHITECTURES.items() if row.quantizable] == ["llama", "mistral", "qwen2", "qwen3"]
    assert require_quantizable({"model_type": "qwen2"}) is ARCHITECTURES["qwen2"]
    with pytest.raises(InputRefused, match=r"model_type mamba: .*it can be measured: qtool measure"):
        require_quantizable({"model_type": "mamba"})


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_group_reads_one_input_and_groups_run_in_order(family: str, tiny_model: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    row = ARCHITECTURES[family]
    network = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    seen: dict[str, Any] = {}
    block = network.get_submodule(row.spine.blocks)[0]

    def note(name: str, values: Any) -> None:
        seen.setdefault(name, values.detach().flatten(0, -2).clone())

    for name in block_linears(row):
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    with torch.no_grad():
        network(torch.arange(6)[None])
    assert sorted(seen) == sorted(set(block_linears(row)) - set(row.uncalled))
    groups = [group for group in row.linear_groups if group[0] in seen]
    order = [name for name in seen if name in {group[0] for group in groups}]
    assert order == [group[0] for group in groups]
    for group in groups:
        assert all(torch.equal(seen[group[0]], seen[name]) for name in group)
    firsts = [seen[group[0]] for group in groups]
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in pairwise(firsts))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_norms_exist(family: str) -> None:
    row = ARCHITECTURES[family]
    names = {template.name for template in row.block}
    assert {f"{norm}.weight" for norm in (*row.norms, *row.head_norms)} <= names
    with_gguf = [template.gguf for template in row.block if template.gguf]
    assert len(set(with_gguf)) == len(with_gguf)
    if row.gguf_architectures:
        assert all(template.gguf for template in (*row.block, *row.outer))


@pytest.mark.parametrize("config", [{}, {"model_type": "gpt2"}, {"model_type": None}, {"model_type": ["llama"]}])
def test_an_unknown_family_lists_the_known_ones(config: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="supported: llama, mistral, qwen2, qwen3"):
        architecture_of(config)
