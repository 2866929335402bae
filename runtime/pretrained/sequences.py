"""The key-value cache of a model from `from_pretrained`: as transformers' generation asks for one, on the native
runtime's layers. It grows as it fills."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qtool.errors import UsageError
from qtool.runtime.native.cache import LayerCache, copy_sequences
from qtool.runtime.native.graphs import DecodeGraph
from qtool.runtime.native.model import NativeModel

SMALLEST = 256


class Memory:
    """Layers for B sequences of so many positions, and the decoding step recorded on them, where there is one."""

    def __init__(self, native: NativeModel, batch: int, length: int) -> None:
        self.layers: list[LayerCache] = native.caches(batch, length)
        self.batch, self.length = batch, length
        self.graph: DecodeGraph | None = None


class MemoryPool:
    """Hands out memory; keeps what was given back last, so that the next text finds its graph recorded."""

    def __init__(self, native: NativeModel) -> None:
        self.native = native
        self._spare: Memory | None = None

    def take(self, batch: int, length: int) -> Memory:
        """Memory for at least so many positions, a power of two of them.

        Raises:
            UsageError: for more than the model has positions.
        """
        most = self.native.max_length
        if length > most:
            raise UsageError(f"{length} tokens", f"the model has {most} positions", "use a shorter text")
        spare, self._spare = self._spare, None
        if spare is not None and spare.batch == batch and spare.length >= length:
            return spare
        del spare  # before more is allocated
        return Memory(self.native, batch, min(most, max(SMALLEST, 1 << (length - 1).bit_length())))

    def give(self, memory: Memory) -> None:
        """Take memory back that nothing reads any more."""
        self._spare = memory


class NativeCache(Cache):
    """Keys and values of B sequences. `columns` counts what transformers counts, padding included; a sequence's own
    length is the number of its tokens, and padding is stored nowhere.

    Args:
        pool: where its memory is from.
        expected: columns that will come, as far as that is known.
    """

    def __init__(self, pool: MemoryPool, expected: int = 0) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self.columns = 0
        self.pool, self._expected = pool, expected
        self._memory: Memory | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeCache:
        """The same sequences in other memory: a prefix that several texts continue. The pool is shared."""
        other = NativeCache(self.pool, self._expected)
        if self._memory is not None:
            other._memory = self.pool.take(self._memory.batch, self._memory.length)
            everything = torch.arange(self._memory.batch, device=self.pool.native.device)
            for old, new in zip(self._memory.layers, other._memory.layers, strict=True):
                copy_sequences(old, new, everything)
        other.lengths, other.columns = list(self.lengths), self.columns
        return other

    def __del__(self) -> None:
        if self._memory is not None:
            self.pool.give(self._memory)

    def advance(self, counts: list[int], columns: int) -> tuple[list[int], Memory]:
        """Make room for so many tokens of each sequence; returns the positions of the first ones, and the memory.

        Raises:
            UsageError: for another number of sequences than there are, and see MemoryPool.take.
        """
        first = self.lengths or [0] * len(counts)
        if len(first) != len(counts):
            why = f"the cache holds {len(first)}"
            raise UsageError(f"{len(counts)} sequences", why, "start without past_key_values")
        last = [begin + count for begin, count in zip(first, counts, strict=True)]
        if self._memory is None or max(last) > self._memory.length:
            self._replace(torch.arange(len(counts)), max(*last, min(self._expected, self.pool.native.max_length)))
        self.lengths, self.columns = last, self.columns + columns
        assert self._memory is not None
        return first, self._memory

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Columns there can be."""
        return self.pool.native.max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put other sequences in the place of these, as many: what beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self._memory is None:
            return
        chosen = torch.arange(self._memory.batch)[indices.cpu()]
        if len(chosen) == self._memory.batch:
            for layer in self._memory.layers:
                copy_sequences(layer, layer, chosen.to(self.pool.native.device))
        else:
            self._replace(chosen, max(self.lengths))
        self.lengths = [self.lengths[i] for i in chosen.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times."""
        if self._memory is not None:
            self.batch_select_indices(torch.arange(self._memory.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −n tokens of every sequence, n at most 0: what assisted generation does.

        Raises:
            UsageError: for a positive number, which meant another thing in older versions.
        """
        if tokens_to_remove > 0 or min(self.lengths, default=0) + tokens_to_remove < 0:
            raise UsageError(f"crop({tokens_to_remove})", "is not 0 or less, or too much", "pass minus what is to go")
        self.lengths = [length + tokens_to_remove for length in self.lengths]
        self.columns += tokens_to_remove

    def reset(self) -> None:
        """Forget everything."""
        if self._memory is not None:
            self.pool.give(self._memory)
        self.lengths, self.columns, self._memory = [], 0, None

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Refused: the model's own attention writes this cache."""
        raise UsageError("past_key_values", "only the model that made it writes this cache", "let it make its own")

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self._memory is not None

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        """Sequences, −1 before the first."""
        return len(self.lengths) or -1

    def _replace(self, sequences: Tensor, length: int) -> None:
        """Memory for these sequences and so many positions, filled with what there is."""
        old, self._memory = self._memory, None
        self._memory = self.pool.take(len(sequences), length)
        if old is not None:
            for before, after in zip(old.layers, self._memory.layers, strict=True):
                copy_sequences(before, after, sequences.to(self.pool.native.device))


class HasMemory(Protocol):
    """What a model's caches get their memory from; another one after the model moved."""

    memory: MemoryPool


def prepare_cache(
    owner: HasMemory, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
) -> None:
    """transformers' `_prepare_cache_for_generation`: a cache for generate(), unless the user brings one or wants none.

    Args:
        owner: of the memory.
        generation_config: of the call.
        model_kwargs: takes the cache.
        rest: the generation mode, sequences, and how many columns there can be.
        more: the same by name.
    """
    if model_kwargs.get("past_key_values") is not None:
        model_kwargs["past_key_values"]._is_user_defined = True
    elif generation_config.use_cache is not False:
        if generation_config.cache_implementation not in (None, "dynamic"):
            what = f"cache_implementation {generation_config.cache_implementation!r}"
            raise UsageError(what, "the checkpoint says what its cache stores", "leave it out")
        expected = int(more["max_cache_length"] if "max_cache_length" in more else rest[-1])
        model_kwargs["past_key_values"] = NativeCache(owner.memory, expected)
