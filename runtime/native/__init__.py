"""A checkpoint as it runs on a GPU: codes in our kernels' layouts, inputs quantized once for all that read them,
merged products, a quantized cache. On a CPU the same modules run on the kernels' plain-torch references."""

from qtool.runtime.native.session import NativeSession, native_device

__all__ = ["NativeSession", "native_device"]
