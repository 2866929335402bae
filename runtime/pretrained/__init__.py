"""A checkpoint as transformers' model: `AutoModelForCausalLM.from_pretrained(folder)` with the native runtime inside.

`import qtool` puts it into transformers' registry of quantizers (`qtool.transformers_hook`).
"""
