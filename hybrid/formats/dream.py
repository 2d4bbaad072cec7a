"""Dream (arXiv 2508.15487): Qwen2.5, trained on without any order; AR's shift is kept."""

from transformers import Qwen2Config

from hybrid.formats import Format

FORMAT = Format(
    model_type="Dream",
    like=Qwen2Config,
    defaults={"mask_token_id": 151666},
    always={"attention_bias": True, "clean_attention": "full", "diffusion_prediction": "next"},
    only=(
        ("block_size", (None,), "Dream text seen in blocks, as later models of that name do"),
        ("use_mrope", (False, None), "positions in several dimensions"),
    ),
)
