"""What the export tests share: a weight source over a tiny model, its quantized checkpoint, its package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.store import stage
from qtool.quantize.quantizers.numerics import choose_grid, encode
from qtool.quantize.transforms.block_hadamard import BlockHadamard
from qtool.quantize.transforms.directions import second_moment_of
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.low_rank import LowRank, low_rank
from qtool.quantize.transforms.quad import quad
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.then_divide import ThenDivide

Around = Callable[[str, int], Mapping[str, Any]]


class FolderSource:
    """A WeightSource over a Hugging Face folder with one safetensors file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
        self._tensors = load_file(folder / "model.safetensors")
        self.digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def stored_dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].copy()

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}

    def linears(self) -> list[str]:
        tied = self.config["tie_word_embeddings"]
        inner = [n.removesuffix(".weight") for n in self.names() if n.endswith("_proj.weight")]
        return [*inner, "lm_head"] if tied or "lm_head.weight" in self._tensors else inner

    def weight_name(self, module: str) -> str:
        tied_head = module == "lm_head" and self.config["tie_word_embeddings"]
        return "model.embed_tokens.weight" if tied_head else f"{module}.weight"


def round_to_nearest(weight: torch.Tensor, scheme: LayerScheme) -> QuantizedTensor:
    """Plain min-max rounding, enough to make a checkpoint; where scales are not plain floats, the project's own."""
    if scheme.weight.scale != "float":
        grid = choose_grid(weight, scheme.weight, mse_clip=False)
        return QuantizedTensor(
            codes=encode(weight, grid, scheme.weight),
            scale=grid.scale,
            scale_factor=grid.factor,
            zero_point=grid.zero_point,
            input_scale=None,
            scheme=scheme,
        )
    fmt, (rows, columns) = scheme.weight.format, weight.shape
    group = group_size_of(scheme.weight.granularity) or columns
    blocks = -(-columns // group)
    padded = torch.nn.functional.pad(weight, (0, blocks * group - columns)).reshape(rows, blocks, group)
    if scheme.weight.symmetric:
        scale = padded.abs().amax(-1) / fmt.qmax
        zero = torch.full_like(scale, fmt.zero_code)
    else:
        low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
        scale = (high - low) / fmt.max_code
        zero = torch.round(-low / scale)
    spread = scale.unsqueeze(-1)
    codes = torch.clamp(torch.round(padded / spread) + zero.unsqueeze(-1), 0, fmt.max_code).to(torch.uint8)
    if fmt.kind == "float":
        codes = (padded / spread).to(torch.float8_e4m3fn)
    return QuantizedTensor(
        codes=codes.reshape(rows, -1)[:, :columns].contiguous(),
        scale=scale.contiguous(),
        zero_point=None if scheme.weight.symmetric else zero.to(torch.uint8),
        input_scale=None,
        scheme=scheme,
    )


def surrounded(
    weight: torch.Tensor, scheme: LayerScheme, *, site: str, transform: SiteTransform | None, rank: int
) -> QuantizedTensor:
    """`round_to_nearest` behind a transform, with a low-rank correction of this rank; side products in 16 bits."""
    main, side = (weight, None) if transform is None else transform.weight(weight)
    rounded = round_to_nearest(main, scheme)
    correction = None
    if rank:
        found = low_rank(main - rounded.dequantize(), rank)
        correction = LowRank(up=found.up.half().float(), down=found.down.half().float())
    return replace(
        rounded,
        transform=transform,
        site=site if transform is not None else "",
        side=None if side is None else side.half().float(),
        low_rank=correction,
    )


def write_checkpoint(
    source: FolderSource,
    output: Path,
    scheme_of: Callable[[str], LayerScheme | None],
    around: Around = lambda module, columns: {"site": "", "transform": None, "rank": 0},
) -> QuantizedCheckpoint:
    with stage(output) as staging:
        writer = CheckpointWriter(staging.path, source.config)
        floats = set(source.names())
        quantized = {}
        for module in source.linears():
            scheme = scheme_of(module)
            if scheme is not None:
                name = source.weight_name(module)
                weight = torch.from_numpy(source.read(name))
                quantized[module] = surrounded(weight, scheme, **around(module, weight.shape[1]))
                floats.remove(name)
        writer.add(quantized, {name: torch.from_numpy(source.read(name)) for name in sorted(floats)})
        staging.commit(Manifest(kind="checkpoint", details=writer.details))
    return QuantizedCheckpoint(output)


@pytest.fixture
def source_of() -> Callable[[Path], FolderSource]:
    return FolderSource


@pytest.fixture
def quantize(tmp_path: Path) -> Callable[..., QuantizedCheckpoint]:
    """quantize(source, scheme or function of the module's name, around=function of module and K) -> QuantizedCheckpoint
    on disk; `around` gives the keywords of `surrounded`."""

    def make(
        source: FolderSource, scheme: LayerScheme | Callable[[str], LayerScheme | None], **options: Any
    ) -> QuantizedCheckpoint:
        scheme_of = scheme if callable(scheme) else lambda module: scheme
        return write_checkpoint(source, tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}", scheme_of, **options)

    return make


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """export(checkpoint, source, **options) -> (folder, details)."""
    from qtool.quantize.export.onnx.package import export_package

    def make(checkpoint: Any, source: FolderSource, **options: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / f"package-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        values = {"tokenizer_files": source.tokenizer_files, "recipe_yaml": None, **options}
        return folder, export_package(checkpoint, folder, progress=lambda *_: None, **values)

    return make


@pytest.fixture
def run_logits() -> Callable[[Path, np.ndarray], np.ndarray]:
    """run_logits(package folder, ids [B, T]) -> logits [B, T, V] of one prefill on the CPU provider."""
    import onnxruntime as ort

    def run(folder: Path, ids: np.ndarray) -> np.ndarray:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for value in session.get_inputs():
            if value.name.startswith("past"):
                heads, size = value.shape[1], value.shape[3]
                feeds[value.name] = np.zeros((ids.shape[0], heads, 0, size), np.float32)
        return session.run(["logits"], feeds)[0]

    return run


@pytest.fixture
def torch_logits() -> Callable[..., np.ndarray]:
    """torch_logits(source, ids, activations=False) -> logits of transformers' own network on the source's weights.

    With a quantized checkpoint as source, its weights are dequantized; `activations` adds the schemes' fake
    quantization of every quantized linear's input.
    """
    from qtool.kernels.quantize_activation import fake_quantize_int8
    from qtool.quantize.artifacts.network import load_network

    def run(source: Any, ids: np.ndarray, *, activations: bool = False) -> np.ndarray:
        network = load_network(source)
        for module, scheme in getattr(source, "schemes", {}).items() if activations else ():
            if scheme.input is not None:
                group = group_size_of(scheme.input.granularity)
                network.get_submodule(module).register_forward_pre_hook(
                    lambda _, inputs, group=group: (fake_quantize_int8(inputs[0], group_size=group), *inputs[1:])
                )
        with torch.no_grad():
            return network(torch.from_numpy(ids)).logits.numpy()

    return run


@pytest.fixture
def ids() -> np.ndarray:
    """Two sequences of 24 tokens of the tiny models' vocabulary."""
    return np.random.default_rng(7).integers(0, 320, (2, 24))




@pytest.fixture
def linear_model() -> Callable[..., Any]:
    """linear_model([{module: (weight, bias or None)}, …]) -> a float graph y0, y1, … of one packed linear each on x."""
    import onnx_ir as ir

    from qtool.quantize.export.onnx.linears import add_initializer, emit_linear

    def make(*packs: Mapping[str, tuple[np.ndarray, np.ndarray | None]]) -> ir.Model:
        columns = next(iter(packs[0].values()))[0].shape[1]
        x = ir.Value(name="x", shape=ir.Shape(["b", "t", columns]), type=ir.TensorType(ir.DataType.FLOAT))
        graph = ir.Graph([x], [], nodes=[], name="g", opset_imports={"": 23, "com.microsoft": 1})
        for index, pack in enumerate(packs):
            weights, biases = [], []
            for module, (weight, bias) in pack.items():
                weights.append(add_initializer(graph, f"{module}.weight", ir.tensor(weight, name=f"{module}.weight")))
                if bias is not None:
                    biases.append(add_initializer(graph, f"{module}.bias", ir.tensor(bias, name=f"{module}.bias")))
            nodes, out = emit_linear(x, tuple(weights), tuple(biases))
            graph.extend(nodes)
            out.name, out.type, out.shape = f"y{index}", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "t", None])
            graph.outputs.append(out)
        return ir.Model(graph, ir_version=11)

    return make


@pytest.fixture
def run_model() -> Callable[..., list[np.ndarray]]:
    """run_model(ir model, **inputs) -> its outputs on the CPU provider, after onnx.checker accepted it."""
    import onnx
    import onnx_ir as ir
    import onnxruntime as ort

    def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
        proto = ir.serde.serialize_model(model)
        onnx.checker.check_model(proto)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
            None, feeds
        )

    return run


@pytest.fixture
def rtn() -> Callable[[np.ndarray, LayerScheme], QuantizedTensor]:
    """rtn(weight [N, K], scheme) -> QuantizedTensor by plain rounding."""
    return lambda weight, scheme: round_to_nearest(torch.from_numpy(weight), scheme)


@pytest.fixture
def surround() -> Callable[..., QuantizedTensor]:
    """surround(weight [N, K], scheme, site=…, transform=…, rank=…) -> QuantizedTensor, see `surrounded`."""
    return lambda weight, scheme, **options: surrounded(torch.from_numpy(weight), scheme, **options)


@pytest.fixture
def transform_of() -> Callable[[str, int], SiteTransform]:
    """transform_of(name, K) -> a transform of one of the kinds "hadamard", "quad", "divide" or "quad, then divide"."""

    def make(name: str, columns: int) -> SiteTransform:
        generator = torch.Generator().manual_seed(columns)
        factors = DivideChannels(factors=torch.rand(columns, generator=generator) + 0.5)
        if name == "divide":
            return factors
        if name == "hadamard":
            return BlockHadamard.random(columns, seed=3, stream="site")
        x = torch.randn(4 * columns, columns, generator=generator) * torch.logspace(1, -1, columns)
        made = quad(second_moment_of(x), 8, seed=3, stream="site")
        return made if name == "quad" else ThenDivide(first=made, division=factors)

    return make


@pytest.fixture
def normal() -> Callable[..., np.ndarray]:
    """normal(*shape) -> float32 normal numbers, new ones at every call, the same in every run."""
    generator = np.random.default_rng(11)
    return lambda *shape: generator.standard_normal(shape, dtype=np.float32)
