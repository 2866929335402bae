"""A Hugging Face model folder: config.json, safetensors (one file, or shards behind an index), tokenizer files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qtool.errors import InputRefused, UsageError
from qtool.quantize.architectures import Architecture, Spine, architecture_of, tensor_shapes
from qtool.quantize.inputs.config import check_config
from qtool.quantize.inputs.regular_file import RegularFile, open_member, read_small
from qtool.quantize.inputs.safetensors_header import read_header
from qtool.quantize.inputs.safetensors_store import Placed, SafetensorsStore, check_shapes, same_bytes
from qtool.quantize.inputs.source_model import SourceModel
from qtool.quantize.inputs.stored_tensors import network_tensors
from qtool.quantize.inputs.strict_json import parse_json_object

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

TOKENIZER_FILES = {
    "tokenizer.json": 2**27,
    "tokenizer_config.json": 2**24,
    "special_tokens_map.json": 2**20,
    "added_tokens.json": 2**24,
    "chat_template.jinja": 2**22,
    "generation_config.json": 2**20,
}
_MAX_CONFIG_BYTES = 2**22
_MAX_INDEX_BYTES = 2**27
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_ROTARY_LEAVES = "inv_freq|cos_cached|sin_cached"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_folder(path: Path) -> SourceModel:
    """Open a model folder; no tensor is read yet.

    Raises:
        UsageError: the path is no folder.
        InputRefused: anything in it that is not exactly as it must be; the message names file and field.
    """
    if not path.is_dir():
        raise UsageError(path, "is not a folder", "give a model folder, a .gguf file or a hub id")
    folder = path.resolve()
    config, notes = _read_config(folder)
    row = architecture_of(config)
    files, stored = read_tensors(folder, row.spine)
    tensors, tied = apply_tie(str(folder), network_tensors(str(folder), stored, config), config, row)
    check_shapes(str(folder), tensors, tensor_shapes(config))
    tokenizer_files, tokenizer_notes = read_tokenizer_files(folder)
    return SourceModel(
        label=str(folder),
        config=config,
        store=SafetensorsStore(files, tensors),
        tokenizer_files=tokenizer_files,
        notes=(*tied, *notes, *tokenizer_notes),
    )


def tie_note(row: Architecture, *, tied: bool) -> str:
    """What to say about the head of a model of this family."""
    spine = row.spine
    if not tied:
        return f"embeddings are not tied: {spine.embedding}.weight and {spine.head}.weight are separate tensors"
    note = f"embeddings are tied: the head ({spine.head}) is {spine.embedding}.weight"
    return f"{note}; when the head is quantized, its codes serve the embedding too" if row.quantizable else note


def read_tokenizer_files(folder: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer's files as they are, by name, and notes on them. They are copied, never executed or rendered."""
    found: dict[str, bytes] = {}
    for name, limit in TOKENIZER_FILES.items():
        if (folder / name).exists() or (folder / name).is_symlink():
            found[name] = read_small(open_member(folder, name), limit)
            if name.endswith(".json"):
                parse_json_object(str(folder / name), found[name])
    notes = []
    if "tokenizer.json" not in found:
        notes.append(f"{folder} has no tokenizer.json: commands that need tokens will refuse this model")
    if b'"auto_map"' in found.get("tokenizer_config.json", b""):
        notes.append("tokenizer_config.json: auto_map is ignored; qtool runs no code from a model")
    return found, tuple(notes)


def _read_config(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    if (folder / "adapter_config.json").exists() and not (folder / CONFIG).exists():
        raise InputRefused(folder, "holds an adapter, not a model", "merge it into its base model first")
    return check_config(CONFIG, read_json_member(folder, CONFIG))


def read_json_member(folder: Path, name: str) -> dict[str, Any]:
    """A small JSON file of a model's folder, parsed."""
    file = open_member(folder, name)
    return parse_json_object(file.label, read_small(file, _MAX_CONFIG_BYTES), infinity=True)


def read_tensors(folder: Path, spine: Spine) -> tuple[list[RegularFile], dict[str, Placed]]:
    """The weight files, and every tensor in them with its file. Rotary tables of old checkpoints are left out: they
    follow from the config."""
    names, weight_map = _weight_files(folder)
    files: list[RegularFile] = []
    tensors: dict[str, Placed] = {}
    for name in names:
        file = open_member(folder, name)
        files.append(file)
        for tensor, record in read_header(file).items():
            if tensor in tensors:
                why = f"is also in {tensors[tensor][0].path.name}"
                raise InputRefused(f"{file.label}: {tensor}", why, "a tensor may exist once")
            if weight_map is not None and weight_map.get(tensor) != name:
                raise InputRefused(f"{file.label}: {tensor}", f"{INDEX} does not place it here", "fix the index")
            tensors[tensor] = (file, record)
    for tensor in weight_map or ():
        if tensor not in tensors:
            where = f"{folder / INDEX}: {tensor}"
            raise InputRefused(where, "is not in the file that the index names", "fix the index")
    trunk = re.escape(spine.blocks.rpartition(".")[0])
    rotary = re.compile(rf"({trunk}|{re.escape(spine.blocks)}\.[0-9]+\.self_attn)\.rotary_emb\.({_ROTARY_LEAVES})")
    return files, {name: placed for name, placed in tensors.items() if not rotary.fullmatch(name)}


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, sorted, and the index's weight map where there is one."""
    single = (folder / SINGLE).is_symlink() or (folder / SINGLE).exists()
    if not (folder / INDEX).exists():
        if not single:
            raise _no_weights(folder)
        return [SINGLE], None
    weight_map = _read_index(folder)
    shards = sorted(set(weight_map.values()))
    if single and SINGLE not in shards:
        raise InputRefused(folder, f"holds two sets of weights, {SINGLE} and {INDEX}", "remove one of them")
    return shards, weight_map


def _read_index(folder: Path) -> dict[str, str]:
    file = open_member(folder, INDEX)
    weight_map = parse_json_object(file.label, read_small(file, _MAX_INDEX_BYTES)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputRefused(f"{file.label}: weight_map", "is not a map of tensors to files", "download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            where = f"{file.label}: weight_map: {tensor!s:.80}"
            raise InputRefused(where, f"{name!r:.80} is not a plain *.safetensors name", "do not trust this model")
    return weight_map


def _no_weights(folder: Path) -> InputRefused:
    suffixes = {entry.suffix.lower() for entry in folder.iterdir()}
    if suffixes & set(_PICKLES):
        remedy = "convert the model to safetensors"
        return InputRefused(folder, "holds its weights as Python pickles only, which qtool never opens", remedy)
    if ".gguf" in suffixes:
        return InputRefused(folder, f"has no {SINGLE} but a .gguf file", "give the path of the .gguf file")
    if ".safetensors" in suffixes:
        return InputRefused(folder, f"has neither {SINGLE} nor {INDEX}", "rename the file, or add the index")
    return InputRefused(folder, f"has no weights (no {SINGLE}, no {INDEX})", "download the model again")


def apply_tie(
    label: str, tensors: dict[str, Placed], config: dict[str, Any], row: Architecture
) -> tuple[dict[str, Placed], Iterable[str]]:
    """The tensors without a head that is stored beside the embedding it is tied to, and what to say about the head.

    Raises:
        InputRefused: a head that is missing, or tied and different.
    """
    embedding, head = f"{row.spine.embedding}.weight", f"{row.spine.head}.weight"
    tied = config["tie_word_embeddings"]
    note = tie_note(row, tied=tied)
    if not tied:
        if head not in tensors:
            why = "is missing, and config.json does not tie the embeddings"
            raise InputRefused(f"{label}: {head}", why, "set tie_word_embeddings to true if this model ties them")
        return tensors, [note]
    if head not in tensors:
        return tensors, [note]
    if embedding in tensors and same_bytes(tensors[head], tensors[embedding]):
        rest = {name: placed for name, placed in tensors.items() if name != head}
        return rest, [note, f"{head} is stored too and equal to {embedding}: it is ignored"]
    why = f"differs from {embedding}, but config.json ties them"
    raise InputRefused(f"{label}: {head}", why, "set tie_word_embeddings to false if the model has its own head")
