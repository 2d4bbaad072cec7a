"""The two acts of `hybrid quickstart`: what is trained, on what, and how it is judged."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrid.evals.frontier import Prompt, Score, Setting
from hybrid.evals.likelihood import Text, tokenized
from hybrid.evals.quality import edit_similarity
from hybrid.noise import Noise
from hybrid.training.data import HybridData, StdlibData, SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.objective import Objective
from hybrid.training.optimizer import Optimizer
from hybrid.training.stdlib import Document
from hybrid.training.tokenizers import encode_document


@dataclass(frozen=True, kw_only=True)
class Act:
    """One act. `prompts` and `text` are made from the loaded data; `options` go to every `generate`."""

    name: str
    title: str
    minutes: float
    quality: dict[str, Any]
    data: HybridData
    task: HybridTask
    prompts: Callable[[], list[Prompt]]
    text: Callable[[], Text]
    score: Score
    settings: tuple[Setting, ...]
    max_new_tokens: int
    block_sizes: tuple[int, ...]
    options: dict[str, Any]
    notes: tuple[str, ...]


def sweep(*thresholds: float, blocks: tuple[int, ...]) -> tuple[Setting, ...]:
    """The settings of a frontier: left to right, speculation, blocks and all at once."""
    found = [Setting(name="one at a time", mode="ar")]
    for k in blocks:
        options: dict[str, Any] = {"block_size": k}
        found.append(Setting(name=f"window {k}", mode="speculative", options=options))
        found.append(Setting(name=f"window {k}, fused", mode="speculative", options={**options, "fused": True}))
    for k in blocks:
        for tau in thresholds:
            options = {"block_size": k, "confidence_threshold": tau}
            found.append(Setting(name=f"block {k}, threshold {tau:g}", mode="block", options=options))
    for tau in thresholds:
        found.append(Setting(name=f"threshold {tau:g}", mode="diffusion", options={"confidence_threshold": tau}))
    return tuple(found)


def puzzles(seed: int) -> Act:
    """4x4 sudoku: short, exact, and easier in any order than from left to right."""
    data = SudokuData(count=100_000, clues=(7, 11), batch_size=64, seed=seed)

    def prompts() -> list[Prompt]:
        begin, given = data.tokenizer.bos_token_id, data.sudoku.prompt_length
        return [
            Prompt(
                ids=[begin, *data.tokenizer.encode(puzzle[:given])], text=puzzle[:given], target=puzzle[given:],
            )
            for puzzle in data.held_out[:256]
        ]  # fmt: skip

    def text() -> Text:
        rows = data.validation_rows
        return Text(ids=rows.ids.long(), target=rows.target, size=int(rows.target.sum()))  # a byte a token

    return Act(
        name="puzzles",
        title="4x4 sudoku, grids never seen in training",
        minutes=5.0,
        quality={
            "name": "solved", "unit": "share", "higher_is_better": True,
            "description": "share of held-out puzzles whose 16 cells are all right",
        },
        data=data,
        task=HybridTask(
            config={
                "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3,
                "max_position_embeddings": 64, "block_size": 8, "tie_word_embeddings": True, "qk_norm": True,
                # Positions 0 to 33: a base of 10,000 would leave most pairs of dimensions all but unrotated.
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            },
            objective=Objective(
                diffusion_weight=1.0, noise=Noise(block_sizes=(4, 8, 16), offset="prompt", canvas_prob=0.3)
            ),
            optimizer=Optimizer(lr=3e-3, muon_lr=0.02, betas=(0.9, 0.98)),
            seed=seed,
        ),
        prompts=prompts,
        text=text,
        score=lambda prompt, output, target: float(data.sudoku.solved(prompt + output)),
        settings=sweep(0.999, 0.99, 0.9, blocks=(4, 8)),
        max_new_tokens=data.sudoku.cells,
        block_sizes=(1, 4, 8),
        options={"eos_token_id": []},
        notes=("Puzzles show 7 to 11 of 16 cells and have one solution; whole grids are held out of training.",),
    )  # fmt: skip


def text(seed: int) -> Act:
    """Python source: what a few minutes on two cores teach about real text, which is little."""
    data = StdlibData(length=128, vocab_size=1024, batch_size=12, seed=seed)
    given, asked, count, scored = 64, 48, 48, 60

    def prompts() -> list[Prompt]:
        return [p for d in data.corpus.test for p in _excerpts(d, data.tokenizer, given, asked, 3)][:count]

    def scored_text() -> Text:
        tokenizer = data.tokenizer
        texts = [d.text for d in data.corpus.test]
        return tokenized(tokenizer, texts, length=128, begin=tokenizer.bos_token_id, rows=scored)

    return Act(
        name="text",
        title="Python's standard library, files never seen in training",
        minutes=1.75,
        quality={
            "name": "edit similarity", "unit": "share", "higher_is_better": True,
            "description": f"of {asked} new tokens to the true continuation: 1 - edit distance / length",
        },
        data=data,
        task=HybridTask(
            config={
                "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
                "max_position_embeddings": 256, "block_size": 8, "tie_word_embeddings": True,
            },
            objective=Objective(noise=Noise(block_sizes=(4, 8))),
            optimizer=Optimizer(lr=3e-3, muon_lr=0.02),
            seed=seed,
        ),
        prompts=prompts,
        text=scored_text,
        score=lambda prompt, output, target: edit_similarity(output, target),
        settings=sweep(0.6, 0.3, blocks=(4, 8)),
        max_new_tokens=asked,
        block_sizes=(1, 4, 8),
        options={},
        notes=("A million parameters and a few minutes on a laptop: expect the look of Python, not its sense.",),
    )  # fmt: skip


def _excerpts(document: Document, tokenizer: Any, given: int, asked: int, count: int) -> list[Prompt]:
    """Prompts that end at a line's end, at places that a hash of the file's name picks, and what follows there."""
    lines = document.text.splitlines(keepends=True)
    found = []
    for number in range(count):
        key = hashlib.sha256(f"{document.name}:{number}".encode()).digest()
        at = int.from_bytes(key[:4], "big") % max(1, len(lines))
        follows = lines[at] if at < len(lines) else ""
        indent = follows[: len(follows) - len(follows.lstrip(" "))]
        before = encode_document(tokenizer, "".join(lines[:at]) + indent)[-given:]
        after = encode_document(tokenizer, "".join(lines[at : at + asked])[len(indent) :])[:asked]
        if len(before) == given and len(after) == asked:
            found.append(Prompt(ids=before, text=tokenizer.decode(before), target=tokenizer.decode(after)))
    return found


ACTS: dict[str, Callable[[int], Act]] = {"text": text, "puzzles": puzzles}
