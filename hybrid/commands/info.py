"""`hybrid info`: what is installed, and what a checkpoint is and can do."""


def info(model: str | None = None) -> None:
    """Say what is installed on this machine and, if asked, what a checkpoint is and which modes it has.

    Example: `hybrid info hybrid-stdlib`.

    Args:
        model: folder of a model, or a hub name.
    """
    import platform

    import lightning
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table

    import hybrid
    from hybrid.training.running.precision import best_precision

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    facts = Table(show_header=False, box=None)
    for name, value in (
        ("hybrid", hybrid.__version__), ("Python", platform.python_version()), ("torch", torch.__version__),
        ("transformers", transformers.__version__), ("lightning", lightning.__version__),
        ("device", device),
        ("training precision", best_precision()),
    ):  # fmt: skip
        facts.add_row(name, str(value))
    Console().print(facts)
    if model is None:
        return

    from hybrid.commands.generate import load
    from hybrid.law import Law

    loaded = load(model)
    config = loaded.config
    facts = Table(show_header=False, box=None, title=model)
    for name, value in (
        ("parameters", f"{loaded.num_parameters():,}"),
        ("size", f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads"),
        ("vocabulary", f"{config.vocab_size:,}"), ("context", f"{config.max_position_embeddings:,} tokens"),
        ("mask token", "none: a pure AR model" if config.mask_token_id is None else config.mask_token_id),
        ("block size", config.block_size), ("clean text sees itself", config.clean_attention),
        ("masked slots predict", config.diffusion_prediction),
        ("modes", ", ".join(Law.of(config).modes)),
    ):  # fmt: skip
        facts.add_row(name, str(value))
    Console().print(facts)
