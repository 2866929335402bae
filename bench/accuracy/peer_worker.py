"""One peer's quantizer in one process of the peer's own environment: reads a model and token ids, writes logits.

Run by peers.py: `python peer_worker.py NAME FOLDER THREADS STEPS`. FOLDER holds model/, calibration.npy and
scored.npy; the logits of the quantized model [B, T, V] go to logits.npy, what is known about the run to facts.json.
Nothing of qtool is imported here. Every peer is called as its own documentation does, with the head left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64
STEP_SEQUENCES = 2  # of AutoRound; its own default of 8, with 200 steps, takes hours on a CPU


def is_block_linear(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")


def torchao(config: str, model: Any, calibration: Any, folder: Path, steps: int) -> Any:
    """torchao, round to nearest without calibration."""
    import torchao.quantization as ao
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    group = ao.PerGroup(GROUP)
    configs = {
        "W4A16": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
        "W4A16 HQQ": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=group,
            intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
        ),
        "W4A8": lambda: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group),
        "W8A8": lambda: ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "W4A16 tinygemm": lambda: ao.Int4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False),
        "W4A16 tinygemm, CPU packing": lambda: PrototypeInt4WeightOnlyConfig(GROUP, set_inductor_config=False),
    }
    if "tinygemm" in config:
        model = model.to(torch.bfloat16)  # its kernels take nothing else
    ao.quantize_(model, configs[config](), is_block_linear)
    return model


def auto_round(config: str, model: Any, calibration: Any, folder: Path, steps: int) -> Any:
    """AutoRound with fewer steps than its default."""
    from auto_round import AutoRound

    four = {"bits": 4, "group_size": GROUP, "sym": True, "data_type": "int"}
    tokens = {"act_bits": 8, "act_group_size": -1, "act_sym": True, "act_data_type": "int", "act_dynamic": True}
    schemes = {"W4A16": four, "W4A8": {**four, **tokens}, "W8A8": "INT8"}
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder / "model"),
        scheme=schemes[config],
        dataset=list(calibration.split(1)),
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        iters=steps,
        batch_size=STEP_SEQUENCES,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
    )
    return rounding.quantize()[0].float()


def llm_compressor(config: str, model: Any, calibration: Any, folder: Path, steps: int) -> Any:
    """llm-compressor's GPTQ."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    tokens = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    four = QuantizationScheme(targets=["Linear"], weights=weights)
    fours = {"W4A16": four, "W4A8": four.model_copy(update={"input_activations": tokens})}
    name = config.removeprefix("SmoothQuant + ")
    chosen = {"config_groups": {"linears": fours[name]}} if name in fours else {"scheme": name, "targets": ["Linear"]}
    recipe: list[Any] = [GPTQModifier(ignore=["lm_head"], **chosen)]
    if config.startswith("SmoothQuant"):
        from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

        recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.8))
    ids = calibration.tolist()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=recipe,
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(ids),
    )
    return model


def float_model(model: Any, calibration: Any, folder: Path, steps: int) -> Any:
    """The control: what scoring through this path adds by itself."""
    return model


TORCHAO = ("W4A16", "W4A16 HQQ", "W4A8", "W8A8", "W4A16 tinygemm", "W4A16 tinygemm, CPU packing")
RUNS: dict[str, Callable[..., Any]] = {
    "float": float_model,
    **{f"torchao {config}": partial(torchao, config) for config in TORCHAO},
    **{f"auto-round {config}": partial(auto_round, config) for config in ("W4A16", "W4A8", "W8A8")},
    **{
        f"llm-compressor GPTQ {config}": partial(llm_compressor, config)
        for config in ("W4A16", "W4A8", "W8A8", "SmoothQuant + W8A8")
    },
}


def bits(model: Any, per_weight: int, per_group: int) -> float:
    """Bits per weight of the quantized linears; 4-bit weights are in groups, 8-bit ones have a scale per row."""
    shapes = [m.weight.shape for name, m in model.named_modules() if is_block_linear(m, name)]
    scales = sum(out * (width // GROUP if per_weight == 4 else 1) for out, width in shapes)
    return per_weight + per_group * scales / sum(out * width for out, width in shapes)


def main() -> None:
    name, folder, threads, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    calibration, scored = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in ("calibration", "scored"))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    # a scale has 16 bits; tinygemm has a zero point of 16 bits beside it
    stored = 32 if name == "float" else bits(model, 8 if "W8" in name else 4, 32 if "tinygemm" in name else 16)
    started = time.monotonic()
    model = RUNS[name](model, calibration, folder, steps)
    facts = {"bits_per_weight_quantized": stored, "seconds": round(time.monotonic() - started, 1)}
    vocabulary = model.config.vocab_size
    logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float32, (*scored.shape, vocabulary))
    with torch.no_grad():
        for i, row in enumerate(scored):
            logits[i] = model(row[None], use_cache=False).logits[0].float().numpy()
    logits.flush()
    facts |= {"torch": torch.__version__, "transformers": version("transformers")}
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
