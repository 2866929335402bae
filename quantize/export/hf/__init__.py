"""Hugging Face folders in the compressed-tensors format, for vLLM and transformers, with the checkpoint's own codes."""

from __future__ import annotations

from qtool.quantize.export.hf.folder import export_folder

__all__ = ["export_folder"]
