"""The tokenizer files of a GGUF model, made from its metadata: byte-level BPE with a known pre-tokenizer.

GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) but does not describe it; the table below holds the ones whose
Hugging Face form is known. Another one would encode almost the same text with almost the same ids, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.inputs.rust_panic import refuse_failures

_BESIDE = "put the model's tokenizer.json beside the .gguf file"
_CONTROL, _USER_DEFINED = 3, 4
_NO_LENGTH_LIMIT = 10**30

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How one family cuts text before BPE.

    Attributes:
        pattern: the regular expression whose matches are the pieces; None: GPT-2's own, which ByteLevel brings.
        digits: numbers are cut into single digits first.
        nfc: text is normalised to NFC.
        ignore_merges: a piece that is a token is taken whole, whatever the merges say.
        adds_bos: what an absent add_bos_token means.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = PreTokenizer(pattern=_WORDS.format(digits="{1,3}"), ignore_merges=True, adds_bos=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(pattern=_WORDS.format(digits=""), nfc=True),
}


def gguf_tokenizer_files(label: str, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, where there is one, chat_template.jinja.

    Args:
        label: how messages name the GGUF file.
        metadata: its metadata.
        config: the validated config.

    Raises:
        InputRefused: no tokenizer, one that is not byte-level BPE, an unknown pre-tokenizer, or damaged lists.
    """
    tokens = _tokens(label, metadata, config["vocab_size"])
    rules = _rules(label, metadata)
    special = _special_tokens(label, metadata, tokens)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", rules.adds_bos)) and "bos_token" in special
    with refuse_failures(f"{label}: tokenizer", _BESIDE):
        tokenizer = _build(tokens, _strings(label, metadata, "tokenizer.ggml.merges"), rules)
        _add_tokens(tokenizer, tokens, metadata)
        _set_post_processor(tokenizer, special["bos_token"] if add_bos else None, tokens)
        text: str = tokenizer.to_str()
    tokenizer_config: dict[str, Any] = {
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings", _NO_LENGTH_LIMIT),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    files = {
        "tokenizer.json": text.encode(),
        "generation_config.json": _json(_generation(metadata, config)),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer_config["chat_template"] = template
        files["chat_template.jinja"] = template.encode()
    return files | {"tokenizer_config.json": _json(tokenizer_config)}


def _rules(label: str, metadata: Mapping[str, Any]) -> PreTokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        why = "is no byte-level BPE, the only kind that qtool builds from GGUF metadata"
        raise InputRefused(f"{label}: tokenizer.ggml.model = {model!r:.40}", why, _BESIDE)
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        why = f"is an unknown pre-tokenizer (known: {', '.join(PRE_TOKENIZERS)})"
        raise InputRefused(f"{label}: tokenizer.ggml.pre = {name!r:.40}", why, _BESIDE)
    return PRE_TOKENIZERS[name]


def _tokens(label: str, metadata: Mapping[str, Any], vocabulary: int) -> list[str]:
    tokens = _strings(label, metadata, "tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= vocabulary:
        why = f"holds {len(tokens)} tokens, the embedding has {vocabulary} rows"
        raise InputRefused(f"{label}: tokenizer.ggml.tokens", why, _BESIDE)
    if len(set(tokens)) != len(tokens):
        raise InputRefused(f"{label}: tokenizer.ggml.tokens", "names a token twice", _BESIDE)
    return tokens


def _strings(label: str, metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise InputRefused(f"{label}: {key}", "is missing or is no list of strings", _BESIDE)
    return value


def _special_tokens(label: str, metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    special: dict[str, str] = {}
    for field, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = metadata.get(f"tokenizer.ggml.{field}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise InputRefused(f"{label}: tokenizer.ggml.{field}_token_id = {number!r:.40}", "is no token", _BESIDE)
        special[f"{name}_token"] = tokens[number]
    return special


def _build(tokens: list[str], merges: list[str], rules: PreTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=rules.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    if rules.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rules.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Any, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    """Control tokens are special (left out when decoding), user-defined ones are matched whole but shown."""
    from tokenizers import AddedToken

    kinds = [int(kind) for kind in metadata.get("tokenizer.ggml.token_type", ())]
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])


def _set_post_processor(tokenizer: Any, bos: str | None, tokens: list[str]) -> None:
    from tokenizers import processors

    if bos is None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokens.index(bos))]
    )


def _generation(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Ids that begin, end and pad a text; a turn's own end (eot) ends a text too."""
    ends = [config["eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id")]
    unique = list(dict.fromkeys(end for end in ends if type(end) is int and 0 <= end < config["vocab_size"]))
    found = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": unique if len(unique) > 1 else next(iter(unique), None),
        "pad_token_id": config["pad_token_id"],
    }
    return {key: value for key, value in found.items() if value is not None}


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
