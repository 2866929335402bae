"""The evaluation report: one JSON file that a later run is compared with, token by token.

It holds no time, path or host: the same session and tokens give the same bytes. Reading trusts nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import qtool
from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.store import write_file
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.evaluate import TOP, Evaluation, perplexity_of

SCHEMA_VERSION = 1
MAX_REPORT_BYTES = 512 * 2**20
Digest = Field(pattern=r"^[0-9a-f]{64}$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ReferenceScore(_Strict):
    """What the subject was compared with when it was scored, and how far it was from it."""

    digest: str = Digest
    description: str
    perplexity: float = Field(gt=0)
    kl_nats: float
    top1_agreement: float = Field(ge=0, le=1)


class EvaluationReport(_Strict):
    """One evaluation. Arrays are base64 of little-endian bytes; P = length − 1, k = min(16, vocab_size − 1).

    Attributes:
        subject: what was scored, in words; subject_digest: its artifact's or model's digest.
        losses: float32 [sequences, P], nats.
        top_ids: int32 [sequences, P, k]; top_logprobs: float16 [sequences, P, k + 1], see Evaluation.
    """

    kind: Literal["evaluation"] = "evaluation"
    schema_version: int = SCHEMA_VERSION
    qtool_version: str = qtool.__version__
    subject: str
    subject_digest: str = Digest
    text_sha256: str = Digest
    tokenizer_sha256: str = Digest
    tokens_sha256: str = Digest
    sequences: int = Field(ge=1)
    length: int = Field(ge=2)
    vocab_size: int = Field(ge=2)
    perplexity: float = Field(gt=0)
    reference: ReferenceScore | None = None
    losses: str
    top_ids: str
    top_logprobs: str

    @model_validator(mode="after")
    def _check_arrays(self) -> Self:
        losses, logprobs, ids = self.loss_array(), self.top_logprob_array(), self.top_id_array()
        if not np.isfinite(losses).all() or losses.min() < 0:
            raise ValueError("losses are not finite and positive")
        if not np.isfinite(logprobs).all() or logprobs.max() > 0:
            raise ValueError("top_logprobs are not log probabilities")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError("top_ids are outside the vocabulary")
        if not math.isclose(self.perplexity, perplexity_of(losses), rel_tol=1e-4):
            raise ValueError("perplexity does not belong to the losses")
        return self

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        *,
        subject: str,
        subject_digest: str,
        text_sha256: str,
        tokenizer_sha256: str,
        reference: str = "",
        reference_digest: str | None = None,
    ) -> EvaluationReport:
        """The report of an evaluation; `reference_digest` is needed when it was made against a reference."""
        score = None
        if evaluation.kl is not None:
            if reference_digest is None:
                raise ValueError("an evaluation against a reference needs the reference's digest")
            score = ReferenceScore(
                digest=reference_digest,
                description=reference,
                perplexity=_known(evaluation.reference_perplexity),
                kl_nats=_known(evaluation.kl_nats),
                top1_agreement=_known(evaluation.top1_agreement),
            )
        sequences, positions = evaluation.losses.shape
        return cls(
            subject=subject,
            subject_digest=subject_digest,
            text_sha256=text_sha256,
            tokenizer_sha256=tokenizer_sha256,
            tokens_sha256=evaluation.tokens_sha256,
            sequences=sequences,
            length=positions + 1,
            vocab_size=evaluation.vocab_size,
            perplexity=evaluation.perplexity,
            reference=score,
            losses=_encode(evaluation.losses, "<f4"),
            top_ids=_encode(evaluation.top_ids, "<i4"),
            top_logprobs=_encode(evaluation.top_logprobs, "<f2"),
        )

    def loss_array(self) -> FloatArray:
        """[sequences, P] float32."""
        array: FloatArray = _decode(self.losses, "<f4", self._shape()).astype(np.float32)
        return array

    def top_id_array(self) -> npt.NDArray[np.int32]:
        """[sequences, P, k] int32."""
        array: npt.NDArray[np.int32] = _decode(self.top_ids, "<i4", (*self._shape(), self._kept())).astype(np.int32)
        return array

    def top_logprob_array(self) -> npt.NDArray[np.float64]:
        """[sequences, P, k + 1], the last column all other ids together."""
        array: npt.NDArray[np.float64] = _decode(self.top_logprobs, "<f2", (*self._shape(), self._kept() + 1)).astype(
            np.float64
        )
        return array

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, two spaces, a final newline."""
        return (json.dumps(self.model_dump(), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    def write(self, path: Path, *, replace: bool = False) -> None:
        """Write atomically: a temporary file beside it, synced, then one rename.

        Raises:
            UsageError: when the file exists and `replace` is not set.
        """
        if not replace and (path.exists() or path.is_symlink()):
            raise UsageError(path, "already exists and is not overwritten", "choose another file")
        if not path.absolute().parent.is_dir():
            raise UsageError(path.parent, "is not a folder", "create it first")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            write_file(temporary, self.to_bytes())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @classmethod
    def read(cls, path: Path) -> EvaluationReport:
        """Read and check every field and every array.

        Raises:
            UsageError: when the file is missing.
            InputRefused: when it is anything but a sound report of this or an older version.
        """
        if not path.is_file():
            raise UsageError(path, "does not exist", "write one with qtool evaluate -o")
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise InputRefused(path, "is larger than any report", "give a report that qtool evaluate wrote")
        data = _parse(path)
        version = data.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            maker = data.get("qtool_version", "a newer version")
            why = f"schema version {version} is newer than {SCHEMA_VERSION}"
            raise InputRefused(path, why, f"use qtool >= {maker}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            _refuse(path, f"{field}: {first['msg']}" if field else first["msg"])

    def _shape(self) -> tuple[int, int]:
        return self.sequences, self.length - 1

    def _kept(self) -> int:
        return min(TOP, self.vocab_size - 1)


def _known(value: float | None) -> float:
    assert value is not None
    return value


def _encode(array: npt.NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")


def _decode(text: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an array is not base64") from None
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != wanted:
        raise ValueError(f"an array holds {len(data)} bytes, its shape {list(shape)} asks for {wanted}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _parse(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number")

    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not JSON ({error})")
    if not isinstance(data, dict) or data.get("kind") != "evaluation":
        _refuse(path, "not an evaluation report")
    return data


def _refuse(path: Path, why: str) -> NoReturn:
    raise InputRefused(path, why, "give a report that qtool evaluate wrote")
