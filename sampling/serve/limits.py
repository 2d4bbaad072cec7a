"""What a request may ask for at most."""

from dataclasses import dataclass

import torch

from hybrid import HybridForCausalLM
from hybrid.sampling.places import free_bytes

COPIES = 4  # of the logits of a window, while a rule looks at them
SHARE = 0.25  # of the memory that is free


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Attributes:
        body: bytes of a request.
        prompt: tokens of a prompt.
        max_tokens: new tokens of a text.
        canvas: new tokens of a text whose window is all of it: of `diffusion`, of gaps that are filled, and of models
            that see everything at once.
        window: slots that a text of `block` and `speculative` puts into one forward.
        n: texts for one prompt.
        stops: strings that end a text.
        max_queue: texts that wait.
        seconds: of a request, waiting included.
        sending: seconds that a client may take to send a request.
        connections: at once.
    """

    body: int = 2 * 2**20
    prompt: int
    max_tokens: int
    canvas: int
    window: int = 256
    n: int = 16
    stops: int = 16
    max_queue: int = 256
    seconds: float = 600.0
    sending: float = 20.0
    connections: int = 1024


def canvas_of(model: HybridForCausalLM, slots: int) -> int:
    """New tokens whose logits, those of all `slots` together, take a quarter of the memory that is free now."""
    each = slots * model.config.vocab_size * torch.float32.itemsize * COPIES
    return max(16, int(SHARE * free_bytes(model)) // each)
