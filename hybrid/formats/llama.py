"""Llama (arXiv 2302.13971) and what was built like it: SmolLM, TinyLlama and others. A pure AR model."""

from transformers import LlamaConfig

from hybrid.formats import Format

FORMAT = Format(model_type="llama", like=LlamaConfig, architecture="LlamaForCausalLM")
