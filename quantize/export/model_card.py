"""README.md of a package: a model card that the Hugging Face Hub parses, with numbers from the artifacts alone.

Nothing in it is measured here, and nothing is a guess: what an artifact does not say is not in the card.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import qtool

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        layout: a key of LAYOUT_WORDS.
        details: the manifest's.
        schemes: module to scheme in words; empty for a float package.
        parents: (kind, digest) of what the package was made from.
        size_bytes: of the files beside the card.
        verification: verification.json, None where the package was not verified.
        evaluation: the numbers of an evaluation report of the checkpoint, None where none was given.
        calibration_tokens: sequences and length of the calibration text, (0, 0) for none.
        base_model: on the Hub, where it is known.
    """

    layout: str
    details: Mapping[str, Any]
    schemes: Mapping[str, str]
    parents: Sequence[tuple[str, str]]
    size_bytes: int
    verification: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    calibration_tokens: Sequence[int] = (0, 0)
    base_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayoutWords:
    """How a layout is called on the Hub, and how it is run; {} stands for the package's folder."""

    library: str
    tags: tuple[str, ...]
    purpose: str
    commands: tuple[tuple[str, str], ...]


_QTOOL = (
    ("bash", "qtool verify {}\nqtool run {} --prompt \"The capital of France is\"\nqtool evaluate {} -o report.json"),
)
# Plain ONNX Runtime with the options that lie beside the model.
_FROM_SESSION_FILE = (
    "import json\nfrom pathlib import Path\n\nimport onnxruntime as ort\n\n"
    'given = json.loads(Path("session.json").read_text())\n'
    "options = ort.SessionOptions()\n"
    'options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, given["graph_optimization_level"])\n'
    'for key, value in given["config_entries"].items():\n    options.add_session_config_entry(key, value)\n'
    'providers = [tuple(provider) for provider in given["providers"]]\n'
    'session = ort.InferenceSession(given["model"], options, providers=providers)'
)
LAYOUT_WORDS: dict[str, LayoutWords] = {
    "genai": LayoutWords(
        library="onnxruntime-genai",
        tags=("onnx", "onnxruntime-genai"),
        purpose="ONNX Runtime and onnxruntime-genai",
        commands=(
            *_QTOOL,
            (
                "python",
                "import onnxruntime_genai as og\n\n"
                'model = og.Model(".")\n'
                "tokenizer = og.Tokenizer(model)\n"
                "params = og.GeneratorParams(model)\n"
                "params.set_search_options(max_length=128)\n"
                "generator = og.Generator(model, params)\n"
                'generator.append_tokens(tokenizer.encode("The capital of France is"))\n'
                "while not generator.is_done():\n    generator.generate_next_token()\n"
                "print(tokenizer.decode(generator.get_sequence(0)))",
            ),
        ),
    ),
    "transformers.js": LayoutWords(
        library="transformers.js",
        tags=("onnx", "transformers.js"),
        purpose="transformers.js",
        commands=(
            (
                "js",
                'import { pipeline } from "@huggingface/transformers";\n\n'
                'const generate = await pipeline("text-generation", MODEL_FOLDER_OR_ID, { dtype: "{dtype}" });\n'
                'console.log(await generate("The capital of France is", { max_new_tokens: 32 }));',
            ),
            *_QTOOL,
        ),
    ),
    "npu": LayoutWords(
        library="onnx", tags=("onnx", "qnn"), purpose="the QNN execution provider of ONNX Runtime", commands=_QTOOL
    ),
    "cuda": LayoutWords(
        library="onnxruntime-genai",
        tags=("onnx", "onnxruntime-genai", "cuda"),
        purpose="the CUDA execution provider of ONNX Runtime, and onnxruntime-genai",
        commands=(
            (
                "bash",
                "pip install onnxruntime-genai-cuda     # genai_config.json names the provider\n"
                'python -c "import onnxruntime_genai as og; og.Model(\'.\')"',
            ),
            ("python", _FROM_SESSION_FILE),
            *_QTOOL,
        ),
    ),
    "tensorrt": LayoutWords(
        library="tensorrt",
        tags=("onnx", "tensorrt"),
        purpose="TensorRT",
        commands=(
            ("bash", "trtexec $(cat trtexec.txt)     # writes model.plan: profile 0 decodes, profile 1 reads prompts"),
            ("python", _FROM_SESSION_FILE),
            *_QTOOL,
        ),
    ),
    "compressed-tensors": LayoutWords(
        library="transformers",
        tags=("compressed-tensors", "vllm"),
        purpose="vLLM and transformers (with compressed-tensors)",
        commands=(
            ("bash", "vllm serve . --dtype {torch_dtype}"),
            (
                "python",
                "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                'model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.{torch_dtype}{dequantize})\n'
                'tokenizer = AutoTokenizer.from_pretrained(".")\n'
                'inputs = tokenizer("The capital of France is", return_tensors="pt")\n'
                "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
            ),
            ("bash", "qtool verify {}\nqtool import {} -o checkpoint     # back, code for code"),
        ),
    ),
}


def model_card(facts: CardFacts) -> bytes:
    """The card: YAML front matter, and markdown. The same facts give the same bytes."""
    words = LAYOUT_WORDS[facts.layout]
    parts = [_front_matter(facts, words), _opening(facts, words), _contents(facts), _verification(facts)]
    parts += [_evaluation(facts), _commands(facts, words)]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def _front_matter(facts: CardFacts, words: LayoutWords) -> str:
    bits = sorted({scheme.split()[0].lower() for scheme in facts.schemes.values()})
    lines = ["---", f"library_name: {words.library}", "pipeline_tag: text-generation"]
    if facts.base_model is not None:
        lines += [f"base_model: {json.dumps(facts.base_model)}"]
        lines += ["base_model_relation: quantized"] if facts.schemes else []
    tags = [*words.tags, "qtool", *bits]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _opening(facts: CardFacts, words: LayoutWords) -> str:
    config = facts.details["config"]
    name = facts.base_model or str(config["model_type"])
    how = "quantized" if facts.schemes else "in float"
    return f"# {name}, {how}, for {words.purpose}\n\nWritten by qtool {qtool.__version__}."


def _contents(facts: CardFacts) -> str:
    details, counts = facts.details, Counter(facts.schemes.values())
    rows = [
        ["architecture", config_words(details["config"])],
        *([f"linears in {scheme}", str(count)] for scheme, count in sorted(counts.items())),
        ["linears in float", str(len(details["float_modules"]))],
        ["bits per weight, all linears, with scales", f"{details['bits_per_weight']:.3f}"],
    ]
    if details.get("bits_per_weight_quantized") is not None:
        rows.append(["bits per weight, quantized linears", f"{details['bits_per_weight_quantized']:.3f}"])
    rows += [["size", f"{facts.size_bytes / 1e6:.1f} MB"]]
    rows += [[f"made from {kind}, sha256", f"`{digest}`"] for kind, digest in facts.parents]
    sequences, length = facts.calibration_tokens
    if sequences:
        rows.append(["calibrated on", f"{sequences} sequences of {length} tokens"])
    notes = "".join(f"\n- {note}" for note in details.get("notes", ()))
    return "## What it is\n\n" + _table(["", ""], rows) + (f"\n{notes}" if notes else "")


def config_words(config: Mapping[str, Any]) -> str:
    """A model's size in words."""
    shape = f"{config['num_hidden_layers']} blocks, hidden {config['hidden_size']}, vocabulary {config['vocab_size']}"
    return f"{config['model_type']}, {shape}"


def _verification(facts: CardFacts) -> str:
    if facts.verification is None:
        return "## Verification\n\nThis package was written with `--no-verify`."
    rows = []
    for check in facts.verification["checks"]:
        limits = check["limits"]
        numbers = ", ".join(f"{name} {check['numbers'][name]} (≤ {limit})" for name, limit in sorted(limits.items()))
        rows.append([check["name"], check["outcome"], numbers or check["detail"]])
    protocol = (
        "What `qtool export` checked before it wrote this folder, against the checkpoint in the torch reference; "
        "limits in brackets. `qtool verify` repeats it from the answers stored beside this file."
    )
    if facts.layout == "compressed-tensors":
        protocol = "The files were read back and compared with the checkpoint, number for number."
    return f"## Verification\n\n{protocol}\n\n" + _table(["check", "outcome", "measured"], rows)


def _evaluation(facts: CardFacts) -> str:
    found = facts.evaluation
    if found is None:
        return "## Evaluation\n\nNo evaluation report was given (`qtool evaluate`, `qtool export --evaluation`)."
    rows = [["perplexity", f"{found['perplexity']:.4f}"]]
    if (reference := found.get("reference")) is not None:
        rows += [
            ["perplexity of the reference", f"{reference['perplexity']:.4f}"],
            ["increase", f"{100 * (found['perplexity'] / reference['perplexity'] - 1):+.2f} %"],
            ["KL(reference ‖ this), nats a token", f"{reference['kl_nats']:.5f}"],
            ["top-1 agreement", f"{100 * reference['top1_agreement']:.2f} %"],
            ["the reference", f"{reference['description']}, sha256 `{reference['digest']}`"],
        ]
    rows += [["text, sha256", f"`{found['text_sha256']}`"], ["tokens, sha256", f"`{found['tokens_sha256']}`"]]
    protocol = (
        f"{found['sequences']} sequences of {found['length']} tokens, every sequence from its own start; scored: "
        f"{found['subject']}, sha256 `{found['subject_digest']}`."
    )
    return f"## Evaluation\n\n{protocol}\n\n" + _table(["", ""], rows)


def _commands(facts: CardFacts, words: LayoutWords) -> str:
    config = facts.details["config"]
    zeros = facts.layout == "compressed-tensors" and any(" asym" in scheme for scheme in facts.schemes.values())
    values = {
        "{dtype}": str(facts.details.get("dtype", "")),
        "{torch_dtype}": str(config.get("torch_dtype", "auto")),
        "{dequantize}": ",\n    quantization_config=CompressedTensorsConfig(dequantize=True)" if zeros else "",
        "{}": ".",
    }
    blocks = []
    for language, text in words.commands:
        for mark, value in values.items():
            text = text.replace(mark, value)
        if zeros:
            text = text.replace("AutoTokenizer\n", "AutoTokenizer, CompressedTensorsConfig\n")
        blocks.append(f"```{language}\n{text}\n```")
    return "## Running it\n\nIn this folder:\n\n" + "\n\n".join(blocks)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines)
