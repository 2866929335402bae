"""qtool: a low-bit quantization and deployment compiler for language models."""

__version__ = "0.1.0"
