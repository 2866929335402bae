"""The only room that opens the user's files: models, texts and recipes, read strictly and without torch."""

from __future__ import annotations

from qtool.quantize.inputs.corpus import builtin_text
from qtool.quantize.inputs.dataset import dataset_text
from qtool.quantize.inputs.domains import DOMAINS, DomainTokens, domain_texts, tokenize_domains
from qtool.quantize.inputs.open_model import open_model
from qtool.quantize.inputs.overlap import overlap_windows, refuse_overlap
from qtool.quantize.inputs.recipe_file import read_recipe
from qtool.quantize.inputs.source_model import SourceModel, check_finite
from qtool.quantize.inputs.text import read_text
from qtool.quantize.inputs.tokens import Tokens, token_texts, tokenize

__all__ = [
    "DOMAINS",
    "DomainTokens",
    "SourceModel",
    "Tokens",
    "builtin_text",
    "check_finite",
    "dataset_text",
    "domain_texts",
    "open_model",
    "overlap_windows",
    "read_recipe",
    "read_text",
    "refuse_overlap",
    "token_texts",
    "tokenize",
    "tokenize_domains",
]
