"""From text to rows of tokens: documents, conversations, tokenizers, and what is kept on the disk."""
