"""Packages for GPUs, judged on the CPU: their form against what the runtimes document, their weights against the
checkpoint, their logits in ONNX Runtime. Nothing here runs on the device, and every result says so."""

from qtool.runtime.device.tensorrt_session import TensorRtSession

DEVICE_TARGETS = ("cuda", "tensorrt")

__all__ = ["DEVICE_TARGETS", "TensorRtSession"]
