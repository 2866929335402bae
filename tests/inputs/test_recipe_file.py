"""Recipes in YAML: plain data only, and an error names the line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.inputs import read_recipe

GOOD = """\
version: 1
seed: 7
ignore: ["re:lm_head"]
rules:
  - match: "*"
    scheme: W4A8
    group_size: 32
    symmetric: false
    quantizer: rtn
    options: {damp: 1e-2, mse_clip: false}
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert recipe == Recipe.from_data(
        {
            "version": 1,
            "seed": 7,
            "ignore": ["re:lm_head"],
            "rules": [
                {
                    "match": "*",
                    "scheme": "W4A8",
                    "group_size": 32,
                    "symmetric": False,
                    "quantizer": "rtn",
                    "options": {"damp": 0.01, "mse_clip": False},
                }
            ],
        }
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    import yaml

    recipe = read_recipe(write(tmp_path, GOOD))
    assert read_recipe(write(tmp_path, yaml.safe_dump(recipe.to_data()))) == recipe


BAD: dict[str, tuple[str | bytes, str]] = {
    "duplicate key": (GOOD + "seed: 8\n", "line 11: duplicate key 'seed'"),
    "duplicate deep key": (GOOD.replace("    quantizer: rtn", "    scheme: W8A8"), "line 9: duplicate key 'scheme'"),
    "unknown key": (GOOD.replace("group_size", "groupsize"), "line 7: rules.0.groupsize: unknown key; did you mean"),
    "unknown top key": (GOOD + "rulez: []\n", "line 11: rulez: unknown key; did you mean rules"),
    "wrong type": (GOOD.replace("seed: 7", "seed: seven"), "line 2: seed = 'seven'"),
    "boolean of YAML 1.1": (GOOD.replace("symmetric: false", "symmetric: no"), "line 8: rules.0.symmetric = 'no'"),
    "octal": (GOOD.replace("seed: 7", "seed: 017"), "line 2: seed = '017'"),
    "nan": (GOOD.replace("1e-2", ".nan"), "line 10: rules.0.options.damp"),
    "future version": (GOOD.replace("version: 1", "version: 9"), "line 1: version 9: made for a newer qtool"),
    "tag": (GOOD.replace("seed: 7", "seed: !!python/object/apply:os.getcwd []"), "line 2: the tag"),
    "plain tag": (GOOD.replace("seed: 7", "seed: !!int 7"), "line 2: the tag"),
    "anchor": (GOOD.replace("seed: 7", "seed: &a 7"), "line 2: anchors"),
    "alias": (GOOD + "x: *a\n", "line 11: anchors"),
    "two documents": (GOOD + "---\n" + GOOD, "second document"),
    "bracket bomb": ("a: " + "[" * 20_000, "nested too deeply"),
    "brace bomb": ("a: " + "{a: " * 20_000, "nested too deeply"),
    "long list": ("a: [" + "1," * 30_000 + "]", "too long"),
    "key is a list": ("? [a]\n: 1\n", "line 1: a key must be"),
    "key is a number": ("1: 2\n", "line 1: a key must be"),
    "list": ("- a\n", "is not a mapping"),
    "scalar": ("word", "is not a mapping"),
    "only a comment": ("# nothing\n", "is not a mapping"),
    "broken": ("a: [1\nb: 2\n", "is not YAML"),
    "tab": ("rules:\n\t- a\n", "line 2: is not YAML"),
    "control character": ("a: \x07\n", "is not YAML"),
    "not UTF-8": (b"a: \xff\n", "not UTF-8"),
    "empty": (b"", "empty"),
    "too large": (b"#" * 2**21, "2097152 bytes"),
    "no rules": ("version: 1\n", "rules"),
    "merge key": (GOOD + "<<: {seed: 1}\n", "line 11: <<: unknown key"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_a_usage_error_with_its_line(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    start = time.perf_counter()
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, text))
    assert time.perf_counter() - start < 2
    assert words in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(UsageError):
            read_recipe(path)
