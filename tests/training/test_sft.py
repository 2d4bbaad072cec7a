"""Fine-tuning on conversations: responses are learned, with a bounded number of EOS tokens behind them."""

import importlib.resources
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hybrid import HybridForCausalLM
from hybrid.training.batch import Batch
from hybrid.training.cli import HybridCLI
from hybrid.training.data import TextData
from hybrid.training.objective import Objective, losses
from hybrid.training.running.start import new_model
from hybrid.training.text.tokenizing import train_bpe

pytestmark = pytest.mark.usefixtures("undrawn")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": "Yes." * (n % 3 + 1)}]
    for n in range(40)
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model for chats, and conversations beside it."""
    tokenizer: PreTrainedTokenizerFast = train_bpe([json.dumps(chat) for chat in CHATS], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("start")
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "max_position_embeddings": 1024, "block_size": 4}  # fmt: skip
    new_model(config, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS)
    (folder / "chats.jsonl").write_text(lines)
    return folder


def data_of(start: Path, tmp_path: Path, eos_tokens: int, length: int = 128) -> TextData:
    chats = [str(start / "chats.jsonl")]
    data = TextData(
        chats, chats, tokenizer=str(start), length=length, batch_size=4, cache=str(tmp_path), eos_tokens=eos_tokens
    )
    data.setup()
    return data


@pytest.mark.parametrize("count", [0, 1, 8])
def test_so_many_eos_tokens_stand_behind_each_conversation(count: int, start: Path, tmp_path: Path) -> None:
    data = data_of(start, tmp_path, count)
    tokenizer, rows = data.tokenizer, data.train_rows
    ids, doc, target = (x.flatten() for x in (rows.ids, rows.doc, rows.target))
    for number in range(20):
        own = doc == number
        text = tokenizer.apply_chat_template(CHATS[number], tokenize=False)
        assert tokenizer.decode(ids[own][1:]) == text + tokenizer.eos_token * count
        learned = tokenizer.decode(ids[own & target])
        assert learned == CHATS[number][1]["content"] + "<|im_end|>\n" + tokenizer.eos_token * count


def test_tokens_are_kept_apart_by_their_number_of_eos_tokens(start: Path, tmp_path: Path) -> None:
    found = [len(data_of(start, tmp_path, count).train_rows) for count in (0, 8, 0)]
    assert found[0] == found[2] < found[1]


def counted(ids: list[int], doc: list[int], target: list[bool], end: int) -> tuple[float, float]:
    """What the ends and all targets of a row count, by walking along it: one for an end, one for all behind it."""
    ends = rest = 0.0
    padding = False
    for i in range(1, len(ids)):
        inside = target[i] and doc[i] == doc[i - 1]
        if inside and ids[i] == end:
            again = ids[i - 1] == end and target[i - 1] and doc[i - 1] == doc[i]
            ends += not again
            ends += again and not padding
            padding = again
        else:
            rest += inside
            padding = False
    return ends, ends + rest


def test_eos_does_not_dominate_what_is_learned_from_short_responses(start: Path, tmp_path: Path) -> None:
    """Behind responses of a few tokens, 16 EOS tokens would be most of the gradient; together they count as two."""
    data = data_of(start, tmp_path, 16)
    batch: Batch = next(iter(data.train_dataloader()))
    model = HybridForCausalLM.from_pretrained(start)
    end = int(data.tokenizer.eos_token_id)
    model.config.eos_token_id = end
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens cost the same, so the gradient at each is what it counts
    read: list[torch.Tensor] = []

    def keep(_module: object, _given: object, out: torch.Tensor) -> None:
        out.retain_grad()
        read.append(out)

    model.lm_head.register_forward_hook(keep)
    follows = batch["target"][:, 1:] & (batch["doc"][:, 1:] == batch["doc"][:, :-1])
    wanted = batch["input_ids"][:, 1:][follows]

    def share(weight: float | None) -> float:
        losses(model, batch, Objective(diffusion_weight=0.0, eos_padding_weight=weight), 0).total.backward()
        gradient = read.pop().grad
        assert gradient is not None
        sizes = gradient.abs().sum(1)
        return float(sizes[wanted == end].sum() / sizes.sum())

    rows = zip(*(batch[key].tolist() for key in ("input_ids", "doc", "target")), strict=True)  # type: ignore[literal-required]
    found = [counted(*row, end) for row in rows]
    expected = sum(ends for ends, _ in found) / sum(total for _, total in found)
    assert share(1.0) == pytest.approx(expected, rel=1e-4)
    assert share(1.0) < 0.45
    assert share(None) > 0.7


def test_the_recipe_runs_from_a_checkpoint(start: Path, tmp_path: Path) -> None:
    recipe = str(importlib.resources.files("hybrid.training").joinpath("recipes", "sft.yaml"))
    chats = f'["{start / "chats.jsonl"}"]'
    HybridCLI.run([
        "fit", "--config", recipe, "--out", str(tmp_path / "model"), f"--model.init_from={start}",
        f"--data.init_args.train={chats}", f"--data.init_args.validation={chats}",
        f"--data.init_args.tokenizer={start}", "--data.init_args.length=128", "--data.init_args.batch_size=2",
        "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
        "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2",
    ])  # fmt: skip
    model, before = HybridForCausalLM.from_pretrained(tmp_path / "model"), HybridForCausalLM.from_pretrained(start)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TEMPLATE


def test_what_cannot_be_is_named(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eos_tokens is -1"):
        data_of(start, tmp_path, -1)
    plain = AutoTokenizer.from_pretrained(start)
    plain.bos_token, plain.eos_token = "<|im_start|>", None
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chats.jsonl").write_text((start / "chats.jsonl").read_text())
    with pytest.raises(ValueError, match="the tokenizer has no eos token"):
        data_of(tmp_path / "plain", tmp_path, 8)
