"""transformers' attention functions by name.

transformers looks its attention function, and how masks are made for it, up by a name in the config. A function of
ours takes a name of its own and calls the one that was there before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Called with the attention module, queries [B, H, T, c], keys and values [B, H_kv, T_k, c], a mask or None and more.
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def named_attention(name: str, module: nn.Module) -> Attend:
    """The function behind a name; every family has its own "eager" one."""
    if name == "eager":
        family: Any = sys.modules[type(module).__module__]
        found: Attend = family.eager_attention_forward
        return found
    return ALL_ATTENTION_FUNCTIONS[name]


def register_attention(name: str, attend: Attend, *, masks_like: str) -> None:
    """Give a function a name; it gets the masks that the function named `masks_like` gets."""
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_like])
