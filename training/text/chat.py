"""Conversations as tokens: the tokenizer's template around them, the loss on the responses only."""

from transformers import PreTrainedTokenizerBase

from hybrid import texts
from hybrid.common.files import BadLine
from hybrid.training.text.documents import Chat


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Chat) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them are to be learned: what the assistant says, its end included.

    Text before a response and the response are tokenised apart, as they are when the model is used. Special tokens
    that a message spells are its text (`hybrid.texts`).

    Raises:
        ValueError: the tokenizer has no chat template.
        BadLine: there is no response, the template takes no such conversation or writes earlier messages in another
            way once there are more, or the tokenizer has no token for some character.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, which messages need: give the tokenizer of a chat model, or set its "
            "chat_template and save it."
        )

    try:
        return _encoded(tokenizer, messages)
    except BadLine:
        raise
    except ValueError as error:
        raise BadLine(f"has messages that cannot be written: {error}") from error


def _encoded(tokenizer: PreTrainedTokenizerBase, messages: Chat) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    target: list[bool] = []
    before = ""
    for count, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        for learned, known in ((False, count - 1), (True, count)):
            now = texts.chat_text(tokenizer, messages[:known], "messages", add_generation_prompt=not learned)
            if not now.startswith(before):
                raise BadLine(f"changes under the chat template when message {count} is added")
            encode = texts.encode_behind if before else texts.encode
            part = encode(tokenizer, now.behind(len(before)), "messages")
            ids, target, before = ids + part, target + [learned] * len(part), str(now)
    if not ids:
        raise BadLine("has no message of the assistant, so nothing to learn")
    return ids, target
