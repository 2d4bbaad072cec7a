"""OLMo, the first (arXiv 2402.00838): Llama with norms that have no weights. A pure AR model."""

from transformers import OlmoConfig

from hybrid.formats import Format

FORMAT = Format(
    model_type="olmo",
    like=OlmoConfig,
    always={"norm": "layer_bare", "rms_norm_eps": 1e-5},
    only=(("clip_qkv", (None,), "queries, keys and values that are clipped"),),
    architecture="OlmoForCausalLM",
)
