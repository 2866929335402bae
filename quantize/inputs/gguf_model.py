"""A GGUF file as a model: its tensors under Hugging Face's names, its metadata as config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures import Architecture, architecture_of, tensor_shapes, tensor_templates
from qtool.quantize.architectures.shapes import gguf_name, tensor_name
from qtool.quantize.inputs.config import check_config
from qtool.quantize.inputs.folder import read_tokenizer_files, tie_note
from qtool.quantize.inputs.gguf_config import gguf_config
from qtool.quantize.inputs.gguf_header import GgufHead, GgufTensor, read_gguf_head
from qtool.quantize.inputs.gguf_store import GgufStore, grid_notes
from qtool.quantize.inputs.gguf_tokenizer import gguf_tokenizer_files
from qtool.quantize.inputs.regular_file import RegularFile, open_regular
from qtool.quantize.inputs.source_model import SourceModel

ROPE_FACTORS = "rope_freqs.weight"
_INTERLEAVED = ("llama",)


def open_gguf(path: Path) -> SourceModel:
    """Open a GGUF file; no weight is read yet. A tokenizer.json beside the file wins over the metadata.

    Raises:
        InputRefused: a damaged file, an unsupported architecture or tokenizer, tensors that do not fit the metadata.
    """
    file = open_regular(path)
    head = read_gguf_head(file)
    raw = gguf_config(file.label, head.metadata, head.tensors, _rope_factors(file, head))
    config, notes = check_config(file.label, raw)
    row = architecture_of(config)
    tensors, head_rows = _named(file.label, head, config, row)
    return SourceModel(
        label=file.label,
        config=config,
        store=GgufStore(file, tensors, head_rows),
        tokenizer_files=_tokenizer_files(path.absolute().parent, file.label, head.metadata, config),
        notes=(tie_note(row, tied=config["tie_word_embeddings"]), *grid_notes(tensors), *notes),
    )


def _tokenizer_files(
    folder: Path, label: str, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, bytes]:
    if (folder / "tokenizer.json").exists():
        return read_tokenizer_files(folder.resolve())[0]
    return gguf_tokenizer_files(label, metadata, config)


def _rope_factors(file: RegularFile, head: GgufHead) -> Any:
    tensor = head.tensors.get(ROPE_FACTORS)
    return None if tensor is None else GgufStore(file, {ROPE_FACTORS: tensor}, {}).load(ROPE_FACTORS).reshape(-1)


def _named(
    label: str, head: GgufHead, config: Mapping[str, Any], row: Architecture
) -> tuple[dict[str, GgufTensor], dict[str, int]]:
    """The tensors that the config asks for by Hugging Face name, and which of them have interleaved head rows."""
    shapes = tensor_shapes(config)
    interleaved = head.metadata["general.architecture"] in _INTERLEAVED
    tensors, head_rows, used = {}, {}, {ROPE_FACTORS}
    for template, index in tensor_templates(config):
        name, stored = tensor_name(row, template, index), gguf_name(template, index)
        tensor = head.tensors.get(stored)
        if tensor is None:
            raise InputRefused(f"{label}: {stored}", "is missing", "give the original model's folder")
        if tensor.shape != shapes[name]:
            why = f"has shape {tensor.shape}, the metadata asks for {shapes[name]}"
            raise InputRefused(f"{label}: {stored}", why, "download the file again")
        tensors[name] = tensor
        used.add(stored)
        if interleaved and template.rotary_rows:
            head_rows[name] = shapes[name][0] // config["head_dim"]
    extra = sorted(set(head.tensors) - used)
    if extra:
        why = f"is not part of this architecture ({len(extra)} such tensors)"
        raise InputRefused(f"{label}: {extra[0]}", why, "give the original model's folder")
    return tensors, head_rows
