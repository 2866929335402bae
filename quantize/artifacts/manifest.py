"""manifest.json: what an artifact is, what it was made from, and the digest of every byte in it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import qtool
from qtool.errors import InputRefused

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
Kind = Literal["statistics", "plan", "checkpoint", "package", "compressed-tensors"]
MAX_MANIFEST_BYTES = 16 * 2**20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Strict):
    """Size and sha256 (hex) of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Parent(_Strict):
    """Something this artifact was made from, by content digest (for an artifact: of its manifest.json)."""

    kind: Literal["model", "text", "statistics", "checkpoint"]
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Strict):
    """The manifest of one artifact. It holds no time, path, host or user: same inputs give the same bytes."""

    kind: Kind
    schema_version: int = SCHEMA_VERSION
    qtool_version: str = qtool.__version__
    seed: int | None = None
    recipe: dict[str, Any] | None = None
    parents: tuple[Parent, ...] = ()
    details: dict[str, Any] = {}
    files: dict[str, FileRecord] = {}

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, two spaces, a final newline."""
        data = json.loads(self.model_dump_json())
        return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical bytes: the artifact's identity."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def parent(self, kind: str) -> str | None:
        """The digest of the parent of this kind, or None."""
        return next((p.digest for p in self.parents if p.kind == kind), None)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        InputRefused: when it is missing, malformed, or made by a newer qtool.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputRefused(folder, f"is not a qtool artifact (no {MANIFEST})", "give a folder that qtool wrote")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise InputRefused(path, "is larger than any manifest", "export the artifact again")
    try:
        data = json.loads(path.read_bytes())
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputRefused(path, "is not a manifest", "export the artifact again") from None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        maker = data.get("qtool_version", "a newer version")
        raise InputRefused(path, f"schema version {version} is newer than {SCHEMA_VERSION}", f"use qtool >= {maker}")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputRefused(f"{path}: {field}", first["msg"], "export the artifact again") from None


def hash_file(path: Path) -> FileRecord:
    """Size and sha256 of a regular file, read in one pass."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
        return FileRecord(sha256=digest.hexdigest(), size_bytes=os.fstat(handle.fileno()).st_size)
