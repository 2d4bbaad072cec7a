"""`hybrid train`: LightningCLI over the library's task and data."""

from hybrid.training.cli import HybridCLI


def train(arguments: list[str]) -> None:
    """Train a model from a YAML recipe, as a Lightning job.

      hybrid train fit --config training/recipes/stdlib.yaml              train
      hybrid train fit --config RECIPE --trainer.max_steps=200            change any field
      hybrid train fit --config RECIPE --wandb offline                    log to Weights & Biases, no account needed
      hybrid train fit --config RECIPE --ckpt_path runs/stdlib.ckpt       go on where a job stopped
      hybrid train fit --config RECIPE --print_config                     show every field and its value
      hybrid train fit --config RECIPE --size 30m                         another size of model: 6m, 30m, 135m, 1b
      hybrid train validate --config RECIPE                               losses of what was trained, on held-out data
      hybrid train test --config RECIPE                                   the same on data that no choice has seen
      hybrid train predict --config RECIPE                                the same, row by row, into a JSONL file
      hybrid train clip --config RECIPE                                   the range of noise that varies least
      hybrid train ablate --config RECIPE                                 what each setting of the objective is worth

    Logs go to CSV, and to wandb if asked.
    Every option of a job: hybrid train fit --help
    """
    HybridCLI.run(arguments)
