"""Eager torch on the dequantized checkpoint: the truth that every other runtime is compared with."""

from qtool.runtime.reference.model import ReferenceSession, load_reference

__all__ = ["ReferenceSession", "load_reference"]
