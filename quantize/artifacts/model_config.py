"""A checkpoint's config.json: the model's own, with the words by which transformers finds qtool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CONFIG = "config.json"
METHOD = "qtool"
FORMAT = 1
DTYPES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def model_config(config: Mapping[str, Any], stored_dtype: str) -> bytes:
    """The bytes of config.json, keys sorted.

    Args:
        config: of the model as it was quantized.
        stored_dtype: of its float tensors as safetensors names it, for a config that names none.
    """
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    dtype = config.get("dtype") or config.get("torch_dtype") or DTYPES.get(stored_dtype, "float32")
    found = {**kept, "dtype": dtype, "quantization_config": {"quant_method": METHOD, "schema_version": FORMAT}}
    return (json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
