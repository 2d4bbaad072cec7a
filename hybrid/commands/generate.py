"""`hybrid generate`: continue a prompt from the command line."""

import sys
from pathlib import Path
from typing import Literal


def generate(
    prompt: str,
    model: str = "runs/quickstart/text",
    mode: Literal["ar", "block", "diffusion", "speculative"] = "ar",
    max_new_tokens: int | None = None,
    block_size: int | None = None,
    confidence_threshold: float | None = None,
    steps_per_block: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Continue a prompt in one of four modes.

    Prints the prompt with its continuation, and on the error stream what it took: tokens, forwards, tokens a second.
    Try the same prompt with --mode ar and --mode speculative: the text is the same, the number of forwards is not.

    Args:
        prompt: the text to continue; "-" reads it from the standard input.
        model: folder of a trained model, or a hub name.
        mode: "ar" is one token a forward; "block" drafts a window of tokens and settles it; "diffusion" drafts all
            that is left at once; "speculative" drafts a window and keeps what the left-to-right model confirms.
        max_new_tokens: how many tokens at most (default: 128, or what the context has room for).
        block_size: the window of "block" and "speculative" (default: the model's).
        confidence_threshold: show drafts that the model is at least this sure of ("block", "diffusion").
        steps_per_block: show drafts in this many forwards a window instead ("block", "diffusion").
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_k: sample from this many likeliest tokens only.
        top_p: sample from the likeliest tokens that make up this probability only.
        seed: of the sampling.
    """
    import torch
    from transformers import AutoTokenizer

    from hybrid.sampling import GenerateOutput

    loaded = load(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    try:
        ids = tokenizer.encode(text)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"prompt: this model's tokenizer has no token for some character ({error}).") from error
    begin = loaded.config.bos_token_id
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    options = {
        "max_new_tokens": max_new_tokens, "block_size": block_size, "steps_per_block": steps_per_block,
        "confidence_threshold": confidence_threshold,
        "top_k": top_k, "top_p": top_p,
    }  # fmt: skip
    out = loaded.generate(
        torch.tensor([ids]), mode=mode, return_dict_in_generate=True,
        do_sample=temperature > 0, temperature=temperature or None, generator=torch.Generator().manual_seed(seed),
        **{k: v for k, v in options.items() if v is not None},
    )  # fmt: skip
    assert isinstance(out, GenerateOutput) and out.sequences is not None
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
    print(f"[{out.stats}]", file=sys.stderr)


def load(model: str):  # type: ignore[no-untyped-def]  # the class is imported lazily
    """A model for use, with a clear word when the default one has not been trained yet."""
    from hybrid import HybridForCausalLM

    path = Path(model)
    if not path.exists() and (path.is_absolute() or path.parts[0] in ("runs", ".", "..") or len(path.parts) > 2):
        raise ValueError(
            f"model: there is no folder {model}. `hybrid quickstart` trains one in runs/quickstart in a few minutes; "
            "or name another with --model."
        )
    return HybridForCausalLM.from_pretrained(model).eval()
