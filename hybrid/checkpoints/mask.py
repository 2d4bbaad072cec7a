"""Which token becomes the mask of a checkpoint that has none."""

from dataclasses import dataclass
from typing import Any

from hybrid.config import HybridConfig

# Special tokens whose names say that no text has them, the likeliest first. `<empty_output>` comes with StarCoder's
# tokenizer, where it stands for a notebook cell that printed nothing; models of chat and prose have never seen it.
FREE = ("mask", "unused", "reserved", "placeholder", "extra_id", "empty_output")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was made.

    Attributes:
        mask_token: the mask as the tokenizer spells it; None where there is no mask, or no tokenizer to spell it.
        mask_token_id: its id; None for a pure AR model.
        reason: why it is that one; empty where no mask was chosen.
        warning: what the reader of the new folder must be told; empty where there is nothing.
    """

    mask_token: str | None = None
    mask_token_id: int | None = None
    reason: str = ""
    warning: str = ""


def choose_mask(tokenizer: Any, config: HybridConfig, wanted: str | None = None) -> Converted:
    """The token that will be the mask, and the tokenizer told so.

    In this order: the one that is `wanted`; what the tokenizer itself calls its mask; a special token whose name says
    that no text has it (`FREE`), unless it has a role or the chat template writes it; a new one.

    Args:
        tokenizer: None where there is none, and then the mask must be wanted by its id.

    Raises:
        ValueError: the wanted token has another role, is part of ordinary text, or is no id of the vocabulary.
    """
    wanted_id = int(wanted) if wanted is not None and wanted.isdecimal() else None
    if wanted_id is not None and wanted_id >= config.vocab_size:
        raise ValueError(f"mask_token is {wanted}; ids of this model are 0 to {config.vocab_size - 1}.")
    if tokenizer is None:
        if wanted_id is None:
            raise ValueError("source has no tokenizer to take the mask token from: give mask_token as an id.")
        return Converted(mask_token_id=wanted_id, reason="asked for")

    special = {i: str(x) for i, x in sorted(tokenizer.added_tokens_decoder.items()) if x.special}
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    roles |= {config.bos_token_id, config.pad_token_id}
    roles |= set(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        token = tokenizer.convert_ids_to_tokens(wanted_id) if wanted_id is not None else wanted
        if token is None:
            raise ValueError(f"mask_token is {wanted}, an id for which the tokenizer has no token; name a new one.")
        found = vocabulary.get(token)
        if found in roles - {None}:
            raise ValueError(f"mask_token {token!r} begins, ends or fills up texts; the mask must be a token apart.")
        if found is not None and found not in special:
            raise ValueError(f"mask_token {token!r} is part of ordinary text; the mask must be a special token.")
        reason = "asked for" if found is not None else "asked for, and new to the tokenizer"
    elif tokenizer.mask_token is not None:
        token, reason = tokenizer.mask_token, "the tokenizer's own mask"
    else:
        template = str(tokenizer.chat_template or "")
        free = [x for i, x in special.items() if i not in roles and x not in template]
        named = [x for word in FREE for x in free if word in x.lower()]
        new = (f"<|mask{'_' * i}|>" for i in range(len(vocabulary) + 1))
        token = named[0] if named else next(x for x in new if x not in vocabulary)
        reason = "a special token that no text has" if named else "new: no special token was free"
    tokenizer.add_special_tokens({"mask_token": token})
    return Converted(mask_token=token, mask_token_id=tokenizer.mask_token_id, reason=reason)
