"""ONNX Runtime on the CPU."""

from qtool.runtime.ort.session import OrtSession

__all__ = ["OrtSession"]
