"""transformers' quantizer of a qtool checkpoint: it loads none of transformers' weights and puts ours in their place.

Two methods are handed the config before files are looked for: transformers up to 5.17 calls `update_tp_plan`, from 5.21
on `update_attn_implementation`, between them both.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.model_config import FORMAT, METHOD

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class QtoolConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint's config.json: that it is one. What is quantized, and how, its manifest
    says."""

    def __init__(self, quant_method: str = METHOD, schema_version: int = FORMAT, **_: Any) -> None:
        if schema_version > FORMAT:
            why = f"schema version {schema_version} is newer than {FORMAT}"
            raise InputRefused("quantization_config", why, "use a newer qtool")
        self.quant_method = quant_method
        self.schema_version = schema_version


class QtoolQuantizer(HfQuantizer):
    """See the module."""

    requires_calibration = True  # a float model is quantized by `qtool quantize`, not while it is loaded

    def __init__(self, quantization_config: QtoolConfig, **options: Any) -> None:
        if not options.get("pre_quantized", True):
            what = "from_pretrained with a quantization_config"
            raise UsageError(what, "does not quantize", "run qtool quantize, load what it wrote")
        super().__init__(quantization_config, **options)
        self._device = torch.device("cpu")
        self._checkpoint: Any = None

    def update_device_map(self, device_map: Any) -> Any:
        """One device: automatic maps become the first GPU, where there is one."""
        if device_map in AUTOMATIC:
            device_map = {"": 0 if torch.cuda.is_available() else "cpu"}
        places = {str(place) for place in (device_map or {}).values()}
        if len(places) > 1:
            why = f"{', '.join(sorted(places))} are several devices"
            raise UsageError("device_map", why, "a qtool model runs on one: device_map='cuda' or 'cpu'")
        if device_map:
            from qtool.runtime.native import native_device

            place = next(iter(device_map.values()))
            self._device = native_device(f"cuda:{place}" if isinstance(place, int) else str(place))
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of activations, and of what stayed in float."""
        if dtype not in FLOATS:
            raise UsageError(f"dtype {dtype}", "no kernel computes in it", "use float32, bfloat16 or float16")
        return dtype

    def update_tp_plan(self, config: Any) -> Any:
        """See the module."""
        return self._with_weights(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """See the module."""
        return self._with_weights(config)

    @property
    def is_trainable(self) -> bool:
        """Codes take no gradients."""
        return False

    def is_serializable(self, **_: Any) -> bool:
        """Nothing but the checkpoint's own folder is the checkpoint: its manifest covers every byte."""
        folder = "the checkpoint" if self._checkpoint is None else self._checkpoint.folder
        raise UsageError("save_pretrained", "a qtool checkpoint is saved already", f"copy the folder {folder}")

    def _with_weights(self, config: Any) -> Any:
        """Name a weight file that exists: transformers opens one before it hands us the model."""
        from qtool.quantize.artifacts.checkpoint_writer import SHARD

        config.transformers_weights = SHARD.format(0)
        return config

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        """Empty the model: transformers finds no parameter that it could fill."""
        from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
        from qtool.runtime.native.model import check_native

        folder = Path(options["checkpoint_files"][0]).parent
        if any(path.is_symlink() for path in folder.iterdir()):
            remedy = "download it into a folder: hf download OWNER/NAME --local-dir FOLDER"
            raise InputRefused(folder, "is a cache of links, no checkpoint folder", remedy)
        self._checkpoint = QuantizedCheckpoint(folder)
        try:
            check_native(self._checkpoint.config)
        except UsageError as error:
            raise InputRefused(folder, error.why, "run it with qtool evaluate --runtime reference") from None
        model.model, model.lm_head = torch.nn.Module(), torch.nn.Module()
        model.all_tied_weights_keys = {}
        model._keys_to_ignore_on_load_unexpected = {".*"}
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from transformers import GenerationConfig

        from qtool.runtime.pretrained.decoder import Head, Loaded, NativeDecoder
        from qtool.runtime.pretrained.sequences import prepare_cache

        loaded = Loaded(self._checkpoint, int(model.config.max_position_embeddings))
        loaded.place(self._device, model.config.dtype)
        model.model, model.lm_head = NativeDecoder(loaded, model.config), Head(loaded)
        model._prepare_cache_for_generation = partial(prepare_cache, loaded)
        if (self._checkpoint.folder / "tokenizer" / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self._checkpoint.folder / "tokenizer")
        return model.eval()


def register(registry: ModuleType) -> None:
    """Add both classes to transformers' registry, unless they are there."""
    if METHOD not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantization_config(METHOD)(QtoolConfig)
        registry.register_quantizer(METHOD)(QtoolQuantizer)
