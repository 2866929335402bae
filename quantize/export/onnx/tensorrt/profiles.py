"""Shape profiles: which sizes of the dynamic dimensions an engine is built for, in the spellings that runtimes read.

TensorRT builds kernels for the range of a profile and tunes them at its `opt` point, so decoding and reading prompts
have one profile each; a runtime that takes a single one gets `all`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.quantize.artifacts.package_files import MODEL_FILE
from qtool.quantize.artifacts.static_graphs import past_name
from qtool.quantize.export.onnx.npu.model_shape import ModelShape
from qtool.quantize.export.onnx.tensorrt.attention import IDS, POSITIONS, SEEN

BOUNDS = ("min", "opt", "max")
Profile = Mapping[str, Mapping[str, tuple[int, ...]]]

PLAN_FILE, CACHE = "model.plan", "engine-cache"


def profiles(shape: ModelShape, chunk: int, context: int) -> dict[str, Profile]:
    """By name: input → bound → shape, one sequence.

    Args:
        shape: of the model.
        chunk: the most tokens of one call.
        context: tokens in the cache and in a call together.
    """
    half = context // 2
    return {
        "decode": _profile(shape, ((1, 0), (1, half), (1, context - 1))),
        "prefill": _profile(shape, ((1, 0), (chunk, 0), (chunk, context - chunk))),
        "all": _profile(shape, ((1, 0), (1, half), (chunk, context - chunk)), longest_past=context - 1),
    }


def session_options(found: Mapping[str, Profile], forms: set[str]) -> dict[str, Any]:
    """session.json: providers in order, with the options that the graph needs.

    NvTensorRTRTX builds strongly typed networks, which quantized graphs want. The older Tensorrt provider builds weakly
    typed ones and has no switch for FP8 and INT4, so it is named for INT8 and float graphs only.
    """
    single = found["all"]
    rtx = {f"nv_profile_{bound}_shapes": _text(single, bound) for bound in BOUNDS}
    options: dict[str, Any] = {
        "model": MODEL_FILE,
        "providers": [["NvTensorRTRTXExecutionProvider", {**rtx, "nv_runtime_cache_path": CACHE}]],
        # TensorRT reads Q and DQ itself; the runtime's own fusions would take them apart.
        "graph_optimization_level": "ORT_DISABLE_ALL",
        "config_entries": {"session.disable_quant_qdq": "1"},
    }
    if forms <= {"int8 per tensor"}:
        older = {f"trt_profile_{bound}_shapes": _text(single, bound) for bound in BOUNDS}
        switches = {"trt_fp16_enable": "1", "trt_int8_enable": "1" if forms else "0"}
        caches = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": CACHE}
        options["alternatives"] = [["TensorrtExecutionProvider", {**older, **switches, **caches}]]
    return options


def trtexec_flags(found: Mapping[str, Profile]) -> str:
    """trtexec.txt: `trtexec $(cat trtexec.txt)` builds the engine."""
    flags = [f"--onnx={MODEL_FILE}", f"--saveEngine={PLAN_FILE}", "--stronglyTyped"]
    for number, name in enumerate(("decode", "prefill")):
        flags.append(f"--profile={number}")
        flags += [f"--{bound}Shapes={_text(found[name], bound)}" for bound in BOUNDS]
    return "\n".join(flags) + "\n"


def _profile(
    shape: ModelShape, points: tuple[tuple[int, int], ...], *, longest_past: int | None = None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """points: (tokens, past) of min, opt and max."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for bound, (tokens, past) in zip(BOUNDS, points, strict=True):
        before = longest_past if bound == "max" and longest_past is not None else past
        sizes: dict[str, tuple[int, ...]] = dict.fromkeys((IDS, POSITIONS), (1, tokens))
        sizes[SEEN] = (1, max(tokens + past, 1 + before))
        cache = (1, shape.kv_heads, before, shape.head_dim)
        sizes |= {past_name(layer, part): cache for layer in range(shape.layers) for part in ("key", "value")}
        for name, size in sizes.items():
            found.setdefault(name, {})[bound] = size
    return found


def _text(profile: Profile, bound: str) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, sizes[bound]))}" for name, sizes in profile.items())
