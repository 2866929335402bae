"""The static-shape graphs of an NPU package as a host sees them: names, shapes, and the cache that is handed round.

Two graphs of one model: the prefill graph reads `chunk` tokens a call, the decode graph one. Both attend to `context`
slots: the ones of the past first, the new tokens' own behind them.

    input_ids          int32   [1, T]
    position_ids       int32   [1, T]
    attention_mask     float32 [1, 1, T, C]        0 where a token may look, MASKED where not
    past_key_values.N.key    [1, kv_heads, head_dim, C − T]    keys lie transposed, as the product wants them
    past_key_values.N.value  [1, kv_heads, C − T, head_dim]
    logits             float32 [1, T, V]
    present.N.key      [1, kv_heads, head_dim, T]  of the new tokens alone; the host writes them into its cache
    present.N.value    [1, kv_heads, T, head_dim]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.weights import FloatArray

PREFILL_FILE, DECODE_FILE, DATA_FILE = "prefill.onnx", "decode.onnx", "npu.data"
PREFIX_FILE = "prefix.safetensors"
IDS, POSITIONS, MASK, LOGITS = "input_ids", "position_ids", "attention_mask", "logits"
MASKED = -65504.0
KEY_AXIS, VALUE_AXIS = 3, 2

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


def past_name(layer: int, part: str) -> str:
    """The input that holds the past keys or values of one layer."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """The output that holds the new tokens' keys or values of one layer."""
    return f"present.{layer}.{part}"


@dataclass(frozen=True, kw_only=True)
class StaticShapes:
    """The numbers that fix every shape of both graphs."""

    chunk: int
    context: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    def to_json(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)

    def past(self, part: str, width: int) -> tuple[int, int, int, int]:
        """Shape of a past input of the graph that reads `width` tokens."""
        slots = self.context - width
        shape = (self.head_dim, slots) if part == "key" else (slots, self.head_dim)
        return (1, self.kv_heads, *shape)

    def widths(self, count: int, start: int, *, padded: bool = True) -> list[int]:
        """The calls that append `count` tokens after `start`: the graph's width of each, chunks first.

        Args:
            count, start: tokens to append, tokens there.
            padded: a chunk that two tokens or more are left for is filled up; False: such tokens go one by one.
        """
        found: list[int] = []
        done = 0
        while done < count:
            enough = count - done >= (2 if padded else self.chunk)
            width = self.chunk if enough and start + done + self.chunk <= self.context else 1
            found.append(width)
            done += min(width, count - done)
        return found


class LazySessions(dict[int, Any]):
    """Sessions by width, each made by `load` when it is first asked for."""

    def __init__(self, load: Callable[[int], Any]) -> None:
        super().__init__()
        self._load = load

    def __missing__(self, width: int) -> Any:
        self[width] = self._load(width)
        return self[width]


class StaticCache:
    """Keys and values of one sequence, in the element type of the graphs.

    Args:
        shapes: of the graphs.
        empty: by past input name, the number that stands for zero, in the input's own type.
    """

    def __init__(self, shapes: StaticShapes, empty: Mapping[str, np.generic]) -> None:
        self._shapes = shapes
        self._buffers: dict[str, Array] = {}
        for layer in range(shapes.layers):
            for part in ("key", "value"):
                name = past_name(layer, part)
                self._buffers[name] = np.full(shapes.past(part, 0), empty[name], dtype=empty[name].dtype)

    def feeds(self, tokens: Integers, start: int, width: int) -> dict[str, Array]:
        """The inputs of one call for tokens [n], n ≤ width, that stand at `start`; the rest of the chunk is padding."""
        shapes = self._shapes
        past = shapes.context - width
        ids = np.zeros((1, width), dtype=np.int32)
        ids[0, : len(tokens)] = tokens
        positions = np.minimum(start + np.arange(width, dtype=np.int32), shapes.context - 1)[None]
        mask = np.full((1, 1, width, shapes.context), MASKED, dtype=np.float32)
        mask[..., :start] = 0
        mask[0, 0, :, past:][np.tril_indices(width)] = 0
        given: dict[str, Array] = {IDS: ids, POSITIONS: positions, MASK: mask}
        for name, buffer in self._buffers.items():
            taken = buffer[..., :past] if name.endswith(".key") else buffer[:, :, :past]
            given[name] = np.ascontiguousarray(taken)
        return given

    def first(self, count: int) -> dict[str, Array]:
        """What the first `count` slots hold, by past input name."""
        return {name: buffer[self._slots(name, count)].copy() for name, buffer in self._buffers.items()}

    def fill(self, given: Mapping[str, Array], count: int) -> None:
        """Put what `first` gave into the first `count` slots."""
        for name, buffer in self._buffers.items():
            buffer[self._slots(name, count)] = given[name]

    def _slots(self, name: str, count: int) -> tuple[Any, ...]:
        return (..., slice(count)) if name.endswith(".key") else (slice(None), slice(None), slice(count))

    def store(self, present: Mapping[str, Array], start: int, count: int) -> None:
        """Write the first `count` new tokens' keys and values behind `start`; `present` is by output name."""
        stop = start + count
        for layer in range(self._shapes.layers):
            self._buffers[past_name(layer, "key")][..., start:stop] = present[present_name(layer, "key")][..., :count]
            values = present[present_name(layer, "value")][:, :, :count]
            self._buffers[past_name(layer, "value")][:, :, start:stop] = values


def present_names(layers: int) -> list[str]:
    """All cache outputs, in order."""
    return [present_name(layer, part) for layer in range(layers) for part in ("key", "value")]


def run_static(
    sessions: dict[int, Any],
    shapes: StaticShapes,
    cache: StaticCache,
    tokens: Sequence[int] | Integers,
    start: int,
    watched: Sequence[str] = (),
    *,
    padded: bool = True,
) -> tuple[FloatArray, list[tuple[int, dict[str, Array]]]]:
    """Append tokens [n] behind `start`, chunk by chunk.

    Args:
        sessions: ONNX Runtime sessions by width: of the prefill graph under `chunk`, of the decode graph under 1.
        shapes: of the graphs.
        cache: is changed.
        tokens: ids.
        start: tokens in the cache.
        watched: more outputs to fetch.
        padded: see StaticShapes.widths.

    Returns:
        Logits [n, V], and for every call how many of its tokens are real and the watched outputs.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    logits = np.empty((len(ids), shapes.vocab_size), dtype=np.float32)
    seen: list[tuple[int, dict[str, Array]]] = []
    wanted = [LOGITS, *present_names(shapes.layers), *watched]
    done = 0
    for width in shapes.widths(len(ids), start, padded=padded):
        count = min(width, len(ids) - done)
        given = cache.feeds(ids[done : done + count], start + done, width)
        results = dict(zip(wanted, sessions[width].run(wanted, given), strict=True))
        logits[done : done + count] = results[LOGITS][0, :count]
        cache.store(results, start + done, count)
        seen.append((count, {name: results[name] for name in watched}))
        done += count
    return logits, seen
