"""A transformers network built on the meta device and filled with checked weights, never with random numbers.

The network can be filled whole (`load_network`) or one block at a time (`NetworkShell`), so that a stage holds
one decoder block in memory however large the model is. transformers supplies the modelling code; nothing of the
model's own files is executed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qtool.errors import InputRefused
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.experts import unpack_experts
from qtool.quantize.artifacts.weights import WeightSource, read_rows_of

Rows = Callable[[Tensor], Tensor]
# Of the families that qtool quantizes; other families' names are in their Spine.
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"


def build_on_meta(source: WeightSource) -> PreTrainedModel:
    """The network of this config on the meta device, in eval mode, float32, its rotary tables real."""
    kept = {k: v for k, v in source.config.items() if k not in ("torch_dtype", "dtype", "transformers_version")}
    values = copy.deepcopy(kept)  # transformers writes into nested values
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.eval().requires_grad_(False)
    network.config.use_cache = False
    unpack_experts(network)
    _recompute_buffers(network)
    return network


def load_network(source: WeightSource, *, skip: frozenset[str] = frozenset()) -> PreTrainedModel:
    """The whole float32 network.

    Args:
        source: every tensor the network wants, and no other.
        skip: tensor names left on the meta device because the caller replaces their module.

    Raises:
        InputRefused: when the source and the network disagree on a name or a shape.
    """
    network = build_on_meta(source)
    _check_names(network, source)
    for name in _parameter_names(network):
        if name not in skip:
            fill(network, name, source)
    return network


class NetworkShell:
    """A network whose blocks and head are filled only while they are used, and whose embedding only as far as a text
    needs it.

    Args:
        source: the model.
        embedded: the embedding that will run, by row: int64 numbers [n], rising, to rows [n, d]; None: the source's.

    Attributes:
        network: the network; the blocks, the embedding and the head are on the meta device, the final norm and what
            else there is are filled.
        blocks: the decoder blocks, in order.
        spine: the names of what lies outside the blocks.
    """

    def __init__(self, source: WeightSource, *, embedded: Rows | None = None) -> None:
        self.source = source
        self._embedded = self._read_rows if embedded is None else embedded
        self.network = build_on_meta(source)
        _check_names(self.network, source)
        self.spine = architecture_of(source.config).spine
        self.blocks: nn.ModuleList = self.network.get_submodule(self.spine.blocks)
        self._names = _parameter_names(self.network)
        later = tuple(f"{name}." for name in (self.spine.blocks, self.spine.embedding, self.spine.head))
        for name in self._names:
            if not name.startswith(later):
                fill(self.network, name, source)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, for the duration of the `with`."""
        prefix = f"{self.block_name(index)}."
        names = [name for name in self._names if name.startswith(prefix)]
        for name in names:
            fill(self.network, name, self.source)
        try:
            yield self.blocks[index]
        finally:
            self.blocks[index].to("meta")

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """The head with its weights, for the duration of the `with`."""
        head = self.fill_head()
        try:
            yield head
        finally:
            head.to("meta")

    def fill_head(self) -> nn.Module:
        """The head with its weights, for good."""
        own = [name for name in self._names if name.startswith(f"{self.spine.head}.")]
        for name in own:
            fill(self.network, name, self.source)
        head = self.network.get_submodule(self.spine.head)
        if not own:
            tied = torch.from_numpy(self.source.read(f"{self.spine.embedding}.weight"))
            head._parameters["weight"] = nn.Parameter(tied, requires_grad=False)
        return head

    def block_name(self, index: int) -> str:
        """The full name of block `index`: "model.layers.3"."""
        return f"{self.spine.blocks}.{index}"

    def block_inputs(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, list[dict[str, Any]]]]:
        """What the network hands its blocks for batches of tokens [B, T].

        Returns:
            For each batch the hidden states [B, T, d] that enter the first block, and per block its keyword arguments
            (rotary embeddings, mask), which differ where blocks attend differently.
        """
        caught: list[tuple[Tensor, dict[str, Any]]] = []
        found: list[tuple[Tensor, list[dict[str, Any]]]] = []
        # The text's own vocabulary, renumbered: a table of only the rows that it needs gives the same vectors.
        vocabulary = torch.unique(torch.cat([batch.flatten() for batch in batches]))
        parent, leaf = parent_of(self.network, self.spine.blocks)
        setattr(parent, leaf, nn.ModuleList([_Catcher(block, caught) for block in self.blocks]))
        try:
            with self._table(self._embedded(vocabulary)):
                for batch in batches:
                    numbered = torch.searchsorted(vocabulary, batch)
                    self.network.base_model(input_ids=numbered, use_cache=False)
                    found.append((caught[0][0], [kwargs for _, kwargs in caught]))
                    caught.clear()
        finally:
            setattr(parent, leaf, self.blocks)
        return found

    @contextmanager
    def _table(self, rows: Tensor) -> Iterator[None]:
        """These rows as the embedding's weight."""
        embedding: Any = self.network.get_input_embeddings()
        nothing, embedding.padding_idx = embedding.weight, None
        embedding.weight = nn.Parameter(rows, requires_grad=False)
        try:
            yield
        finally:
            embedding.weight = nothing

    def _read_rows(self, numbers: Tensor) -> Tensor:
        return torch.from_numpy(read_rows_of(self.source, f"{self.spine.embedding}.weight", numbers.numpy()))


class _Catcher(nn.Module):
    """Stands in for a block: notes what it is given and lets the hidden states through."""

    def __init__(self, block: nn.Module, caught: list[tuple[Tensor, dict[str, Any]]]) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule: it must stay where it is
        self._caught = caught

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self._caught.append((hidden, kwargs))
        return hidden


def run_block(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One decoder block on hidden states [B, T, d], with the keyword arguments of `block_inputs`."""
    out = block(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def fill(network: PreTrainedModel, name: str, source: WeightSource) -> None:
    """Put one checked tensor in the place of a meta parameter.

    Raises:
        InputRefused: when the shapes differ.
    """
    module, leaf = parent_of(network, name)
    wanted = tuple(getattr(module, leaf).shape)
    value = torch.from_numpy(source.read(name))
    if tuple(value.shape) != wanted:
        raise InputRefused(name, f"has shape {tuple(value.shape)}, the config asks for {wanted}", "check the model")
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    if module is network.get_input_embeddings() and network.config.tie_word_embeddings:
        network.get_output_embeddings()._parameters["weight"] = module._parameters[leaf]


def parent_of(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, and the last part of the name."""
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path), leaf


def replace_module(network: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace the module of this name by what `make` returns for it."""
    module, leaf = parent_of(network, name)
    setattr(module, leaf, make(getattr(module, leaf)))


def _parameter_names(network: PreTrainedModel) -> list[str]:
    names = sorted(name for name, _ in network.named_parameters(remove_duplicate=False))
    if network.config.tie_word_embeddings:
        names.remove(f"{HEAD}.weight")
    return names


def _check_names(network: PreTrainedModel, source: WeightSource) -> None:
    wanted, given = set(_parameter_names(network)), set(source.names())
    if wanted != given:
        name = sorted(wanted ^ given)[0]
        problem = "is missing from the checkpoint" if name in wanted else "is not part of this architecture"
        raise InputRefused(name, f"{problem} ({len(wanted ^ given)} such tensors)", "check the model's config.json")


def _recompute_buffers(network: nn.Module) -> None:
    """Build what is computed from the config, not stored, off the meta device: rotary tables and embedding scales."""
    for name, module in list(network.named_modules()):
        meta = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if meta == ["embed_scale"]:
            module._buffers["embed_scale"] = torch.tensor(module.scalar_embed_scale)
        elif meta:
            replace_module(network, name, lambda old: type(old)(config=network.config))
    left = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if left:
        raise InputRefused(left[0], "is a buffer that qtool cannot rebuild from the config", "report this model type")
