"""Gemma, the first (arXiv 2403.08295): Llama with a GELU, norms that store what they differ from 1 by, and embeddings
scaled by the root of their size. A pure AR model."""

from transformers import GemmaConfig

from hybrid.formats import Format

FORMAT = Format(
    model_type="gemma",
    like=GemmaConfig,
    always={"hidden_act": "gelu_pytorch_tanh", "norm": "rms_offset", "scale_embeddings": True},
    only=(("use_bidirectional_attention", (False, None), "attention to what follows"),),
    architecture="GemmaForCausalLM",
)
