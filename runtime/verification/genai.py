"""Does onnxruntime-genai itself load the folder and generate? Asked in a child process, which may crash or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEW_TOKENS = 8
TIMEOUT_S = 300
NOT_INSTALLED = "skipped: onnxruntime-genai is not installed"

_CHILD = """
import json, sys
import onnxruntime_genai as og
folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
config = og.Config(folder)
if sys.argv[4] == "cpu":
    config.clear_providers()
model = og.Model(config)
params = og.GeneratorParams(model)
params.set_search_options(do_sample=False, min_length=len(prompt) + count, max_length=len(prompt) + count)
generator = og.Generator(model, params)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(i) for i in generator.get_sequence(0)][len(prompt):]))
"""


def genai_generates(folder: Path, prompt: Sequence[int], vocab_size: int, *, on_cpu: bool = False) -> str:
    """Let onnxruntime-genai continue a prompt by NEW_TOKENS tokens.

    Args:
        folder: with a genai_config.json.
        prompt: token ids.
        vocab_size: of the model.
        on_cpu: leave out the execution providers that the folder names.

    Returns:
        "pass", NOT_INSTALLED, or "fail: " and the reason.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return NOT_INSTALLED
    given = [str(folder.absolute()), json.dumps(list(prompt)), str(NEW_TOKENS), "cpu" if on_cpu else "named"]
    command = [sys.executable, "-I", "-c", _CHILD, *given]
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"fail: nothing after {TIMEOUT_S} s"
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return f"fail: exit {child.returncode}: {last[:200]}"
    try:
        ids = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return "fail: no tokens came back"
    good = len(ids) == NEW_TOKENS and all(0 <= i < vocab_size for i in ids)
    return "pass" if good else f"fail: {len(ids)} tokens came back, {NEW_TOKENS} were asked for"
