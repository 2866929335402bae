"""What a command line argument names: a package, a checkpoint or a model, opened and described."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import UsageError
from qtool.quantize.artifacts.manifest import MANIFEST, Manifest, Parent, read_manifest

if TYPE_CHECKING:
    from qtool.cli.options import EngineChoice
    from qtool.quantize.artifacts.weights import WeightSource
    from qtool.runtime.session import Session

# By a package's target: module and name of its session, and what it is called.
PACKAGE_SESSIONS = {
    "cpu": ("qtool.runtime.ort", "OrtSession", "package in ONNX Runtime"),
    "npu": ("qtool.runtime.npu", "NpuSession", "NPU package simulated in ONNX Runtime"),
    "cuda": ("qtool.runtime.ort", "OrtSession", "CUDA package on ONNX Runtime's CPU provider"),
    "tensorrt": ("qtool.runtime.device", "TensorRtSession", "TensorRT package simulated in ONNX Runtime"),
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint or a model, with everything an export copies from it."""

    source: WeightSource
    tokenizer_files: Mapping[str, bytes]
    parents: tuple[Parent, ...]
    estimate_bytes: int
    recipe: dict[str, Any] | None = None
    recipe_yaml: bytes | None = None
    seed: int | None = None
    notes: tuple[str, ...] = ()
    calibration_windows: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something that can be scored."""

    session: Session
    tokenizer_files: Mapping[str, bytes]
    digest: str
    description: str
    model_digest: str
    notes: tuple[str, ...] = ()
    calibration_windows: tuple[str, ...] = ()


def artifact_kind(argument: str) -> str | None:
    """The kind of artifact at this path, or None when it is no artifact (then it names a model)."""
    folder = Path(argument)
    return read_manifest(folder).kind if (folder / MANIFEST).is_file() else None


def open_weights(argument: str) -> Weights:
    """Open a checkpoint folder or a model.

    Raises:
        UsageError: for another kind of artifact.
    """
    kind = artifact_kind(argument)
    if kind is None:
        return _open_model(argument)
    if kind != "checkpoint":
        makes_one = "; qtool import makes a checkpoint of this folder" if kind == "compressed-tensors" else ""
        raise UsageError(argument, f"is a {kind}", f"give a checkpoint or a model{makes_one}")
    return _open_checkpoint(Path(argument))


def open_subject(argument: str, *, threads: int, length: int, engine: EngineChoice | None = None) -> Subject:
    """Open a package in ONNX Runtime, a checkpoint or a model in the torch reference or the native runtime.

    Raises:
        UsageError: for a runtime that does not run what the argument names.
        EnvironmentFault: for a device that is not there.
    """
    kind = artifact_kind(argument)
    runtime = None if engine is None else engine.runtime
    if runtime is not None and (kind == "package") != (runtime == "onnxruntime"):
        why = f"does not run a {kind or 'model'}"
        remedy = "leave it out" if kind == "package" else "use reference or native, or export a package"
        raise UsageError(f"--runtime {runtime}", why, remedy)
    if kind == "package":
        return _open_package(Path(argument), threads=threads, length=length)
    if engine is not None and engine.native:
        return _open_native(argument, threads=threads, length=length, device=engine.device)
    weights = open_weights(argument)

    import torch

    from qtool.runtime.reference import ReferenceSession

    torch.set_num_threads(threads)
    return Subject(
        session=ReferenceSession(weights.source),
        tokenizer_files=weights.tokenizer_files,
        digest=weights.source.digest,
        description=f"{'checkpoint' if kind else 'model'} in the torch reference",
        model_digest=_model_digest(weights.parents),
        notes=weights.notes,
        calibration_windows=weights.calibration_windows,
    )


def open_packaged(folder: Path, manifest: Manifest, *, threads: int, length: int) -> Session:
    """A package in what runs its target here."""
    module, name, _ = PACKAGE_SESSIONS[manifest.details["target"]]
    session: Session = getattr(importlib.import_module(module), name)(folder, threads=threads, max_length=length)
    return session


def open_native(source: WeightSource, *, threads: int, length: int, device: str | None) -> Session:
    """The native runtime on a device, on a GPU without one."""
    import torch

    from qtool.runtime.native import NativeSession

    torch.set_num_threads(threads)
    return NativeSession(source, device=device or "cuda", max_length=length)


def _open_native(argument: str, *, threads: int, length: int, device: str | None) -> Subject:
    from qtool.runtime.native import native_device

    where = native_device(device or "cuda")  # before gigabytes are read
    weights = open_weights(argument)
    kind = artifact_kind(argument) or "model"
    session = open_native(weights.source, threads=threads, length=length, device=device)
    return Subject(
        session=session,
        tokenizer_files=weights.tokenizer_files,
        digest=weights.source.digest,
        description=f"{kind} in the native runtime on {where}",
        model_digest=_model_digest(weights.parents),
        notes=(*weights.notes, session.description),
        calibration_windows=weights.calibration_windows,
    )


def _open_model(argument: str) -> Weights:
    from qtool.quantize.inputs import open_model

    model = open_model(argument)
    return Weights(
        source=model,
        tokenizer_files=model.tokenizer_files,
        parents=(Parent(kind="model", digest=model.digest),),
        estimate_bytes=model.float_bytes,
        notes=model.notes,
    )


def _open_checkpoint(folder: Path) -> Weights:
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint

    checkpoint = QuantizedCheckpoint(folder)
    manifest = checkpoint.manifest
    model = manifest.parent("model")
    assert model is not None
    recipe = folder / "recipe.yaml"  # an imported checkpoint has none
    return Weights(
        source=checkpoint,
        tokenizer_files={path.name: path.read_bytes() for path in sorted((folder / "tokenizer").iterdir())},
        parents=(Parent(kind="checkpoint", digest=checkpoint.digest), Parent(kind="model", digest=model)),
        estimate_bytes=2 * sum(record.size_bytes for record in manifest.files.values()),
        recipe=manifest.recipe,
        recipe_yaml=recipe.read_bytes() if recipe.is_file() else None,
        seed=manifest.seed,
        calibration_windows=tuple(manifest.details["calibration_windows"]),
    )


def _open_package(folder: Path, *, threads: int, length: int) -> Subject:
    from qtool.quantize.artifacts.store import open_artifact

    manifest = open_artifact(folder, kind="package")
    return Subject(
        session=open_packaged(folder, manifest, threads=threads, length=length),
        tokenizer_files={"tokenizer.json": (folder / "tokenizer.json").read_bytes()},
        digest=manifest.digest,
        description=PACKAGE_SESSIONS[manifest.details["target"]][2],
        model_digest=_model_digest(manifest.parents),
        calibration_windows=tuple(manifest.details["calibration_windows"]),
    )


def _model_digest(parents: tuple[Parent, ...]) -> str:
    return next(parent.digest for parent in parents if parent.kind == "model")
