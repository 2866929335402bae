"""The arithmetic both halves share. Kernels know tensors and integers, never models or schemes."""
