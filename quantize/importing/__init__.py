"""Checkpoints out of models that other tools have quantized: the same codes, nothing rounded again."""

from __future__ import annotations

from qtool.quantize.importing.import_folder import import_folder, same_codes

__all__ = ["import_folder", "same_codes"]
