"""A package served by onnxruntime-genai alone: nothing of qtool is imported.

    python bench/genai_direct.py .demo/run/package-w4a8-gptq
"""

from __future__ import annotations

import json
import sys

import onnxruntime_genai as og

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
)


def main() -> None:
    model = og.Model(sys.argv[1])
    tokenizer = og.Tokenizer(model)
    for prompt in PROMPTS:
        messages = json.dumps([{"role": "user", "content": prompt}])
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=200, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(tokenizer.encode(text))
        stream = tokenizer.create_stream()
        print(f"> {prompt}")
        while not generator.is_done():
            generator.generate_next_token()
            print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
        print("\n")


if __name__ == "__main__":
    main()
