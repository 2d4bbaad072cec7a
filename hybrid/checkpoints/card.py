"""The model card: README.md of a model folder, in the form that the hub reads."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrid.checkpoints.tensorfile import CheckpointError, read_header
from hybrid.config import HybridConfig
from hybrid.law import Law

NAME = "README.md"
MARK = "<!-- Written by hybrid, and again with every save. Take this line out, and the card is yours and stays. -->"
# transformers puts this card in the place of any other when it uploads a model.
STOCK = "This model card has been automatically generated."
BESIDE = (
    "Each speed belongs to the quality beside it: both are of the same outputs. Tokens per forward counts drafts, "
    "commits and verifications; `ar` is 1."
)


def write_card(folder: Path, config: HybridConfig, **more: Any) -> bool:
    """Write the card of a model, unless somebody else wrote one.

    What was measured belongs to weights. So a card stays as long as the weights are those that it was written for, and
    that of the folder that a model was loaded from is taken along.

    Args:
        more: of `card`.

    Returns:
        Whether it was written; not, where there is a card of somebody's own.
    """
    path = folder / NAME
    if path.exists() and not _ours(path):
        return False
    weights = _weights(folder)
    if not more and weights is not None:
        if path.exists() and weights in path.read_text(encoding="utf-8"):
            return True
        before = Path(config.name_or_path or "")
        others = before.is_dir() and (before / NAME).is_file() and not before.samefile(folder)
        if others and _weights(before) == weights:
            path.write_bytes((before / NAME).read_bytes())
            return True
    text = card(config, **more)
    path.write_text(text if weights is None else text.replace(MARK, f"{MARK}\n{weights}"), encoding="utf-8")
    return True


def card(
    config: HybridConfig, *, title: str | None = None, license: str | None = None, base_model: str | None = None,
    facts: Mapping[str, object] | None = None, tables: Iterable[str] = (),
) -> str:  # fmt: skip
    """The text of a card: what the hub wants to know, how the model is used, and what was measured.

    Args:
        license: an identifier of the hub's (`apache-2.0`); the hub shows none without it.
        base_model: what it was made of, as a hub name.
        facts: of its training, by what they are called.
        tables: in Markdown, of what was measured.
    """
    # The most particular last: the example shows it. A mask token may be given to the model later.
    modes = [mode for mode in ("ar", "diffusion", "speculative", "block") if mode in Law.of(config).modes] or ["ar"]
    head = {
        "library_name": "hybrid-lm", "pipeline_tag": "text-generation", "license": license, "base_model": base_model,
        "tags": ["hybrid", *(["diffusion-language-model", "speculative-decoding"] if config.is_hybrid else [])],
    }  # fmt: skip
    about = {
        "layers": f"{config.num_hidden_layers} of {config.hidden_size}, {config.num_attention_heads} heads",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "mask token": "none" if config.mask_token_id is None else config.mask_token_id,
        "default block": f"{config.block_size} tokens",
        "clean text sees itself": config.clean_attention,
    }
    parts = [
        "---\n" + "".join(_yaml(key, value) for key, value in head.items() if value is not None) + "---",
        MARK,
        f"# {title or 'A hybrid language model'}",
        f"One transformer, decoded in {_listed([f'`{mode}`' for mode in modes])} with the same weights. It is loaded "
        "by `hybrid` (`pip install hybrid-lm`); nothing in this repository is executed.",
        "```python\n"
        "from transformers import AutoTokenizer\n"
        "from hybrid import HybridForCausalLM\n\n"
        'model = HybridForCausalLM.from_pretrained("PATH OR NAME OF THIS REPOSITORY")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH OR NAME OF THIS REPOSITORY")\n'
        'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids\n'
        f'print(tokenizer.decode(model.generate(ids, mode="{modes[-1]}", max_new_tokens=64)[0]))\n'
        "```",
        "`AutoModelForCausalLM.from_pretrained` loads it too, once `import hybrid` has made the type known.",
        markdown_table(("", ""), about.items()),
    ]
    if facts:
        parts += ["## Training", markdown_table(("", ""), facts.items())]
    if tables := list(tables):
        parts += ["## Quality against speed", BESIDE, *tables]
    return "\n\n".join(parts) + "\n"


def markdown_table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [tuple(headings), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ours(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    return MARK in text or STOCK in text


def _weights(folder: Path) -> str | None:
    """A line that stands for the weights of a folder, by what their checksums say; None where there are none."""
    try:
        sums = {k: x for file in folder.glob("model*.safetensors") for k, x in read_header(file).checksums.items()}
    except CheckpointError:
        return None
    digest = hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()
    return f"<!-- of the weights {digest} -->" if sums else None


def _yaml(key: str, value: object) -> str:
    if isinstance(value, list):
        return f"{key}:\n" + "".join(f"- {item}\n" for item in value)
    return f"{key}: {value}\n"


def _listed(words: list[str]) -> str:
    return words[0] + " only" if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
