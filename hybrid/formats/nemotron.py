"""Nemotron-Labs-Diffusion (arXiv 2607.05722): Ministral 3 under other names, and a hybrid: clean text is strictly
causal, drafts are bidirectional in their block."""

from transformers import Ministral3Config

from hybrid.formats import Format

FORMAT = Format(
    model_type="nemotron_labs_diffusion",
    like=Ministral3Config,
    defaults={"mask_token_id": 100, "block_size": 32},
    always={"clean_attention": "causal", "diffusion_prediction": "in_place"},
    names={"encoder": "model", "diffusion_head": "lm_head"},
    architecture="NemotronLabsDiffusionModel",
    own_head=True,  # SGLang's loader always makes one, and passes over its missing in silence
)
