"""An NPU package on this machine: simulated in ONNX Runtime, checked against the NPU's rules, audited for ranges."""

from qtool.runtime.npu.session import NpuSession

__all__ = ["NpuSession"]
