"""Conversations as tokens: the tokenizer's template around them, the loss on the responses only."""

from transformers import PreTrainedTokenizerBase

from hybrid.training.text.documents import BadLine, Chat


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Chat) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them are to be learned: what the assistant says, its end included.

    Text before a response and the response are tokenised apart, as they are when the model is used.

    Raises:
        ValueError: the tokenizer has no chat template.
        BadLine: there is no response, a message spells a special token, or the template writes earlier messages in
            another way once there are more.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, which messages need: give the tokenizer of a chat model, or set its "
            "chat_template and save it."
        )
    for message in messages:
        for token in tokenizer.all_special_tokens:
            # In the text of a template it would become that token: a mask, or an end where none is.
            if token in message["content"]:
                raise BadLine(f"has a message that spells the special token {token}")

    def text(count: int, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask))

    ids: list[int] = []
    target: list[bool] = []
    done = ""
    for count, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        for learned, now in ((False, text(count - 1, ask=True)), (True, text(count))):
            if not now.startswith(done):
                raise BadLine(f"changes under the chat template when message {count} is added")
            part = tokenizer.encode(now[len(done) :], add_special_tokens=False)
            ids, target, done = ids + part, target + [learned] * len(part), now
    if not ids:
        raise BadLine("has no message of the assistant, so nothing to learn")
    return ids, target
