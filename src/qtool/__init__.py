"""qtool: a low-bit quantization and deployment compiler for language models."""

from qtool import transformers_hook

__version__ = "0.1.0"

transformers_hook.install()
