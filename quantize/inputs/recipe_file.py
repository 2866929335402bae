"""A recipe as YAML, read as plain data only: no tags, no anchors, no duplicate keys, no surprising types.

Scalars mean what YAML 1.2's core schema says: `no` is a string, 1e-3 is a number, 017 is no octal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.inputs.regular_file import open_regular, read_small
from qtool.quantize.inputs.text import decode_text

MAX_RECIPE_BYTES = 2**20
MAX_DEPTH = 16
MAX_NODES = 20_000
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9]{0,18})$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
)


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        UsageError: the path, the YAML or the recipe is wrong; the message names the line where it can.
    """
    if not path.is_file():
        raise UsageError(path, "is not a file" if path.exists() else "does not exist", "give a recipe in YAML")
    try:
        text = decode_text(str(path), read_small(open_regular(path), MAX_RECIPE_BYTES))
    except InputRefused as error:  # a recipe is the user's own: a usage error, whatever is wrong with it
        raise UsageError(error.what, error.why, error.remedy) from None
    return parse_recipe(str(path), text)


def parse_recipe(label: str, text: str) -> Recipe:
    """As `read_recipe`, for text already read."""
    try:
        _check_events(label, text)
        node = _Loader(text).get_single_node()
        data = _plain(label, node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(_at(label, mark), f"is not YAML ({error.problem or error.context})", "fix that line") from None
    except yaml.YAMLError as error:
        raise UsageError(label, f"is not YAML ({str(error).splitlines()[0]})", "fix the file") from None
    try:
        return Recipe.from_data(data, name=label)
    except UsageError as error:
        field = error.what.removeprefix(f"{label}: ")
        line = _line_of(node, field)
        raise UsageError(f"{label}, line {line}: {field}" if line else error.what, error.why, error.remedy) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first) + ([""] if "null" in _tag else []))


def _check_events(label: str, text: str) -> None:
    """Walk the file once as a stream: depth, size, anchors, tags. A bomb ends here, before any tree is built."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        where = _at(label, event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UsageError(where, "anchors and aliases are not allowed", "write it out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise UsageError(where, f"the tag {tag} is not allowed", "use plain values")
        if isinstance(event, yaml.DocumentStartEvent) and count > 1:
            raise UsageError(where, "a second document begins", "one file holds one recipe")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise UsageError(where, "nested too deeply, or too long", "a recipe is small")


def _plain(label: str, node: Any) -> Any:
    """A node tree to plain data, duplicate keys refused."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(label, item) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return None if node is None else _scalar(label, node)
    result: dict[str, Any] = {}
    for key_node, value in node.value:
        key = _plain(label, key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise UsageError(_at(label, key_node.start_mark), "a key must be a plain word", "fix that line")
        if key in result:
            raise UsageError(_at(label, key_node.start_mark), f"duplicate key {key!r}", "keep one")
        result[key] = _plain(label, value)
    return result


def _scalar(label: str, node: Any) -> Any:
    kind = node.tag.rpartition(":")[2]
    if kind == "float" and len(node.value) > 64:
        raise UsageError(_at(label, node.start_mark), "a number of absurd length", "fix that line")
    return _CONVERT.get(kind, str)(node.value)


_CONVERT: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: text.lower() == "true",
    "null": lambda _: None,
}


def _line_of(node: Any, field: str) -> int | None:
    """The line of a dotted field such as "rules.0.scheme", as deep as the file goes."""
    line = None
    for part in field.split(" ")[0].rstrip(":").split("."):
        if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
        elif isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
            continue
        else:
            break
        line = node.start_mark.line + 1
    return line


def _at(label: str, mark: Any) -> str:
    return label if mark is None else f"{label}, line {mark.line + 1}"
