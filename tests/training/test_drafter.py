"""A drafter learns what verification will say of it, and nothing else changes."""

import importlib.resources
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import MASK, head_by_hand, shaken, texts, tiny
from safetensors.torch import load_file
from torch import Tensor

from hybrid import HybridForCausalLM, Layout
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.noise import corrupt
from hybrid.training.batch import Batch
from hybrid.training.cli import HybridCLI
from hybrid.training.module import HybridTask
from hybrid.training.objectives import drafter as drafter_module
from hybrid.training.objectives.drafter import Drafter, _before, drafter_losses, lk_loss
from hybrid.training.running.checkpoint import save_folder
from hybrid.training.text.tokenizing import train_bpe

pytestmark = pytest.mark.usefixtures("undrawn")
LENGTH = 22


class Places(defaultdict[int, list[bool]]):
    """What drafts at each place behind what is known were, right or wrong."""

    def __init__(self) -> None:
        super().__init__(list)


def batch(documents: bool) -> Batch:
    ids = torch.tensor(texts(5, [LENGTH] * 3))
    doc, target = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    if documents:
        doc[0, 9:] = 1
        doc[1, 15:] = -1
        target[2, :7] = False
    return Batch(input_ids=ids, target=target & (doc >= 0), doc=doc, index=torch.tensor([4, 0, 7]))


def trained_a_little(model: HybridForCausalLM, drafter: Drafter) -> DraftAdapter:
    options = {"head_size": drafter.head_size, "words": drafter.words, "head_rank": 5}
    adapter = DraftAdapter(model, 3, 6.0, drafter.targets, dtype=torch.float64, **options)
    if adapter.head is not None:
        shaken(adapter.head)
    source = torch.Generator().manual_seed(1)
    for up in adapter.up.values():
        up.data.normal_(std=0.3, generator=source)
    return adapter


def slow_lk(p: Tensor, q: Tensor, drafter: Drafter, without_mask: bool = True) -> Tensor:
    """One slot, with dictionaries."""
    p, q = p / drafter.temperature, q / drafter.temperature
    top = drafter.top or len(p)
    union = sorted({*p.topk(top).indices.tolist(), *q.topk(top).indices.tolist()} - ({MASK} if without_mask else set()))
    a, b = p[union].softmax(0), q[union].softmax(0)
    kl = sum(x * (x.log() - y.log()) for x, y in zip(a, b, strict=True))
    overlap = sum(min(x, y) for x, y in zip(a, b, strict=True))
    share = math.exp(-drafter.eta * float(overlap))
    return share * kl + (1 - share) * (1 - overlap)


def slow_head_loss(
    model: HybridForCausalLM, adapter: DraftAdapter, given: Batch, drafter: Drafter
) -> tuple[Tensor, float, Places]:
    """The same of a head, from a forward over each text, place by place and draft by draft."""
    ids, doc, head = given["input_ids"], given["doc"], adapter.head
    assert head is not None
    layout = Layout.of(place := torch.arange(LENGTH).expand_as(ids), place, 0, doc)
    hidden = model(ids, layout=layout, output_hidden_states=True).hidden_states[-1]
    words = head.ids.tolist()
    total, weights, rounds, kept, places = torch.zeros(()).double(), 0.0, 0, 0, Places()
    for row, start in itertools.product(range(len(ids)), range(LENGTH)):
        reached, agreed = 1.0, True
        for slot in range(start + 2, min(start + 1 + max(drafter.block_sizes), LENGTH)):
            if doc[row, slot] != doc[row, start] or doc[row, slot] < 0:
                break
            q = head_by_hand(head, hidden[row, start], model.model.embed_tokens.weight[ids[row, start + 1 : slot]], 24)
            p = model.lm_head(hidden[row, slot - 1]).detach()
            best = int(p.index_fill(0, torch.tensor([MASK]), -torch.inf).argmax())
            learned, right = bool(given["target"][row, slot]), int(q.argmax()) == best
            p, q = p[words], q[words]  # the two laws over what can be drafted
            weight = drafter.sampled * reached + (1 - drafter.sampled) * agreed if drafter.slots == "reached" else 1.0
            if learned and best in words:
                loss = -q.log_softmax(0)[words.index(best)]
                if drafter.kind == "lk":
                    loss = drafter.ce_weight * loss + slow_lk(p, q, drafter, without_mask=False)
                total, weights = total + weight * loss, weights + weight
            rounds += learned and slot == start + 2
            kept += learned and agreed and right
            places[slot - start - 1] += [right] * learned
            token = words.index(int(ids[row, slot])) if int(ids[row, slot]) in words else 0
            reached *= min(1.0, float(q.detach().softmax(0)[token] / p.softmax(0)[token]))
            agreed = agreed and right
    return total / weights, 1 + kept / rounds, places


def slow_loss(
    model: HybridForCausalLM, adapter: DraftAdapter, given: Batch, drafter: Drafter
) -> tuple[Tensor, float, Places]:
    """The loss, the kept tokens and what is right at each place from one joint forward over both streams, slot by slot.
    """
    ids, doc = given["input_ids"], given["doc"]
    noised = corrupt(ids, torch.ones_like(doc, dtype=torch.bool), doc, given["index"], drafter.noise, model.config, 2)
    place = torch.arange(LENGTH).expand_as(ids)
    layout = Layout.of(place, place, 0, doc).cat(noised.layout)
    both = torch.cat([ids, noised.tokens], 1)
    hidden = model(both, layout=layout, draft_adapter=adapter, output_hidden_states=True).hidden_states[-1]

    def logits(row: Tensor) -> Tensor:
        found: Tensor = model.lm_head(row)
        return found.index_fill(0, torch.tensor([MASK]), -torch.inf)

    total, weights, rounds, kept, places = torch.zeros(()).double(), 0.0, 0, 0, Places()
    for row in range(len(ids)):
        reached, agreed = 1.0, True
        for slot in range(LENGTH):
            start = int(noised.layout.block[row, slot])
            if slot == start:
                reached, agreed = 1.0, True
                continue
            drafted = hidden[row, LENGTH + slot]
            if doc[row, slot] < 0 or doc[row, slot] != doc[row, start]:
                continue
            p, q = logits(hidden[row, slot - 1]).detach(), logits(drafted)
            best, token = int(p.argmax()), int(ids[row, slot])
            loss = -q.log_softmax(0)[best]
            if drafter.kind == "lk":
                loss = drafter.ce_weight * loss + slow_lk(p, q, drafter)
            weight = 1.0
            if drafter.slots == "reached":
                weight = drafter.sampled * reached + (1 - drafter.sampled) * agreed
            learned = bool(given["target"][row, slot])
            total, weights = total + weight * learned * loss, weights + weight * learned
            rounds += learned and slot == start + 1
            reached *= min(1.0, float(q.detach().softmax(0)[token] / p.softmax(0)[token]))
            kept += learned and agreed and int(q.argmax()) == best
            places[slot - start] += [int(q.argmax()) == best] * learned
            agreed = agreed and int(q.argmax()) == best
    return total / weights, 1 + drafter.seedless_prob + kept / max(1, rounds), places


SETTINGS = {
    "ce": Drafter(kind="ce", block_sizes=(3, 5)),
    "lk": Drafter(kind="lk", top=5, ce_weight=0.7),
    "head": Drafter(head_size=6, block_sizes=(3, 5), targets=(), kind="ce"),
    "head that is reached": Drafter(head_size=6, block_sizes=(4,), targets=(), words=15, slots="reached", top=6),
    "lk over all": Drafter(kind="lk", top=0, temperature=1.0, eta=3.0, slots="reached", sampled=0.6),
}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("drafter", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_is_that_of_the_joint_forward(
    drafter: Drafter, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clean text without gradients and the windows behind it, in pieces: the same loss and gradients."""
    monkeypatch.setattr(drafter_module, "CHUNK", 7)
    model, given = tiny(3, peaked=0.3).requires_grad_(False), batch(documents)
    adapter = trained_a_little(model, drafter)
    want, kept, places = (slow_loss if adapter.head is None else slow_head_loss)(model, adapter, given, drafter)
    want.backward()
    wanted = [p.grad.clone() for p in adapter.parameters()]  # type: ignore[union-attr]
    adapter.zero_grad()
    found = drafter_losses(model, adapter, given, drafter, seed=2)
    found.total.backward()
    assert abs(found.total.item() - want.item()) < 1e-5 * want.item()  # logits are judged in float32
    assert found.kept is not None and found.kept.item() == pytest.approx(kept)
    most = max(drafter.block_sizes or (model.config.block_size,)) - 1
    assert len({*places}) == most > 1
    for k, right in places.items():
        part = found.parts[f"draft_accuracy_{k}"]
        assert (int(part.total), int(part.count), part.weight) == (sum(right), len(right), 0.0)
    for p, grad in zip(adapter.parameters(), wanted, strict=True):
        assert p.grad is not None and (p.grad - grad).abs().max() < 1e-5 * max(1.0, grad.abs().max().item())
    assert max(float(p.grad.abs().max()) for p in adapter.parameters()) > 1e-4  # type: ignore[union-attr]


def test_with_the_models_own_output_a_head_learns_the_rest() -> None:
    model, drafter = tiny(3, peaked=0.3), Drafter(head_size=6, head_rank=16, targets=(), words=9, block_sizes=(4,))
    adapter = drafter.attach(model, 0)
    head, own = adapter.head, model.lm_head.weight[:9].t().float()
    assert head is not None and torch.equal(head.say, own)
    drafter_losses(model, adapter, batch(False), drafter, seed=2).total.backward()
    assert head.say.grad is None and all(p.grad is not None for p in head.parameters() if p is not head.say)
    assert drafter.artifact(model, adapter).head.say.shape == own.shape  # type: ignore[union-attr]


def test_a_file_says_what_a_head_guesses_at(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text("[20, 3, 8]")
    head = Drafter(head_size=6, targets=(), words=str(tmp_path / "words.json")).attach(tiny(3), 0).head
    assert head is not None and head.ids.tolist() == [20, 3, 8]
    with pytest.raises(ValueError, match=r"words: .*none\.json"):
        Drafter(head_size=6, targets=(), words=str(tmp_path / "none.json")).attach(tiny(3), 0)


def test_lk_is_zero_where_the_two_agree_and_its_gradient_is_the_drafters() -> None:
    source = torch.Generator().manual_seed(0)
    p = torch.randn(4, 30, generator=source, dtype=torch.float64, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    assert lk_loss(p, q, top=4).abs().max() < 1e-12
    q.data += torch.randn(4, 30, generator=source, dtype=torch.float64)
    lk_loss(p, q, top=4).sum().backward()
    assert p.grad is None and q.grad is not None
    # What is in neither top is not touched; adding a constant to all logits changes nothing.
    for row in range(4):
        union = {*p[row].topk(4).indices.tolist(), *q[row].topk(4).indices.tolist()}
        outside = [i for i in range(30) if i not in union]
        assert not q.grad[row, outside].any() and q.grad[row].sum().abs() < 1e-12


def test_reached_is_the_law_of_verification() -> None:
    """Averaging over accepted and first rejected drafts, drafted from q and verified by p, is averaging over p's own
    text with these weights: enumerated for three drafts of three tokens."""
    source = torch.Generator().manual_seed(4)
    q = torch.rand(3, 3, generator=source, dtype=torch.float64).softmax(-1)
    p = {
        prefix: (3 * torch.rand(3, generator=source, dtype=torch.float64)).softmax(-1)
        for n in range(3) for prefix in itertools.product(range(3), repeat=n)
    }  # fmt: skip
    cost = {prefix: float(torch.rand((), generator=source)) for prefix in p}  # of judging the next slot there
    want = 0.0
    for drafts in itertools.product(range(3), repeat=3):
        drawn, alive = math.prod(float(q[i, x]) for i, x in enumerate(drafts)), 1.0
        for i, x in enumerate(drafts):
            want += drawn * alive * cost[drafts[:i]]
            alive *= min(1.0, float(p[drafts[:i]][x] / q[i, x]))

    def by_weight(inclusive: bool = False) -> float:
        found = 0.0
        for text in itertools.product(range(3), repeat=3):
            chances = torch.stack([p[text[:i]][x] for i, x in enumerate(text)])
            ratio = (q[range(3), list(text)] / chances).log().clamp(max=0)
            drafted, starts = torch.tensor([[False, True, True, True]]), torch.zeros(1, 4, dtype=torch.int64)
            before = _before(ratio, drafted, starts) + (ratio if inclusive else 0)
            for i, weight in enumerate(before.exp().tolist()):
                found += float(chances.prod()) * weight * cost[text[:i]]
        return found

    assert by_weight() == pytest.approx(want, abs=1e-12)
    assert by_weight(inclusive=True) != pytest.approx(want, abs=1e-3), "a wrong law would be noticed"


# --- The job --------------------------------------------------------------------------------------------------

SENTENCE = "the cat sat on the mat and the dog lay on the rug while the bird sang in the tree"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and text."""
    root = tmp_path_factory.mktemp("base")
    words = SENTENCE.split()
    lines = [" ".join(words[i % 7 : i % 7 + 12]) for i in range(60)]
    tokenizer = train_bpe(lines, 300)
    save_folder(tiny(1, dtype=torch.float32, vocab_size=len(tokenizer), mask_token_id=0), tokenizer, root / "model")
    for name in ("train", "held-out"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return root


def recipe(name: str) -> Path:
    return Path(str(importlib.resources.files("hybrid.training").joinpath("recipes", name)))


def words(base: Path, out: Path, steps: int, *more: str, name: str = "drafter.yaml") -> list[str]:
    return [
        "fit", "--config", str(recipe(name)), "--out", str(out), f"--trainer.max_steps={steps}",
        "--trainer.accelerator=cpu", f"--model.init_from={base / 'model'}",
        f"--data.init_args.train=[{base}/train.jsonl]", f"--data.init_args.validation=[{base}/held-out.jsonl]",
        f"--data.init_args.tokenizer={base / 'model'}",
        "--data.init_args.length=24", "--data.init_args.batch_size=8", f"--data.init_args.cache={base / 'cache'}",
        "--model.objective.dtype=float32", "--model.objective.save_dtype=float32", "--trainer.val_check_interval=12",
        "--model.objective.rank=4", "--model.optimizer.decay=none", "--trainer.log_every_n_steps=1",
        "--trainer.limit_val_batches=1", "--model.optimizer.warmup_steps=2", "--model.optimizer.lr=0.005", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("whole") / "drafter"
    return out, HybridCLI.run(words(base, out, 24)).trainer


def test_the_recipe_trains_an_adapter_and_leaves_the_model_alone(base: Path, whole: tuple[Path, Any]) -> None:
    out, trainer = whole
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = HybridForCausalLM.from_pretrained(base / "model").eval()
    for name, weight in trainer.lightning_module.model.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    saved = torch.load(out.parent / "drafter.ckpt", weights_only=True)["state_dict"]
    assert saved and all(name.startswith("beside.") for name in saved), "the model is not saved again"
    assert trainer.callback_metrics["val/kept"] > 1.25, "it began with 1.1"

    prompt = torch.tensor([[1, 40, 60, 71]])
    options: dict[str, Any] = {"max_new_tokens": 40, "return_dict_in_generate": True, "eos_token_id": []}
    drafted = model.generate(prompt, mode="speculative", block_size=8, draft_adapter=str(out), **options)
    assert torch.equal(model.generate(prompt, **options).sequences, drafted.sequences)


def test_samples_show_what_the_drafts_have_become(base: Path, tmp_path: Path) -> None:
    """What the model says is always the same, and what its drafts are worth is learned."""
    sampling = {"every": 12, "count": 2, "max_new_tokens": 12}
    callbacks = [{"class_path": "hybrid.training.SampleModes", "init_args": sampling}]
    HybridCLI.run(words(base, tmp_path / "drafter", 24, f"--trainer.callbacks={json.dumps(callbacks)}"))
    lines = (tmp_path / "logs" / "drafter" / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["mode"] == "speculative"]
    assert [row["step"] for row in rows] == [12, 12, 24, 24]
    assert rows[0]["output"] == rows[2]["output"]
    assert sum(row["acceptance"] for row in rows[:2]) < sum(row["acceptance"] for row in rows[2:])


def test_it_goes_on_where_it_stopped(base: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    HybridCLI.run(words(base, tmp_path / "drafter", 9))
    found = HybridCLI.run(words(base, tmp_path / "drafter", 24, "--ckpt_path", str(tmp_path / "drafter.ckpt")))
    assert found.trainer.global_step == 24
    ours, theirs = (load_file(x / "adapter_model.safetensors") for x in (tmp_path / "drafter", whole[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["stdlib-head.yaml", "smollm2-head.yaml"])
def test_the_recipes_of_heads_run(name: str, base: Path, tmp_path: Path) -> None:
    """On this model, with a head of its size."""
    (tmp_path / "words.json").write_text(json.dumps([*range(3, 90)]))
    sizes = ["--model.objective.head_size=6", "--model.objective.head_rank=16"]
    if "words" in yaml.safe_load(recipe(name).read_text())["model"]["objective"]["init_args"]:
        sizes.append(f"--model.objective.words={tmp_path / 'words.json'}")
    HybridCLI.run(words(base, tmp_path / "head", 2, *sizes, name=name))
    assert (tmp_path / "head" / "draft_head.safetensors").exists()
    model, prompt = HybridForCausalLM.from_pretrained(base / "model").eval(), torch.tensor([[1, 40, 60, 71]])
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}
    drafted = model.generate(prompt, mode="speculative", draft_adapter=str(tmp_path / "head"), **options)
    assert torch.equal(model.generate(prompt, **options), drafted)


def test_a_half_precision_file_is_half_as_large_and_loads(base: Path, tmp_path: Path) -> None:
    HybridCLI.run(words(base, tmp_path / "drafter", 2, "--model.objective.save_dtype=bfloat16"))
    tensors = load_file(tmp_path / "drafter/adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    model = HybridForCausalLM.from_pretrained(base / "model").eval()
    model.generate(torch.tensor([[1, 5]]), mode="speculative", draft_adapter=tmp_path / "drafter", max_new_tokens=4)


def test_the_real_recipe_fits_in_16_megabytes() -> None:
    """Of SmolLM2-135M, by its sizes."""
    said = yaml.safe_load(recipe("drafter.yaml").read_text())["model"]["objective"]["init_args"]
    hidden, kv, inner, layers = 576, 192, 1536, 30
    maps = {
        "q_proj": 2 * hidden, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": 2 * hidden,
        "gate_proj": hidden + inner, "up_proj": hidden + inner, "down_proj": hidden + inner,
    }  # fmt: skip
    assert layers * said["rank"] * sum(maps[t] for t in Drafter().targets) * 2 < 16e6


@pytest.mark.parametrize(
    ("given", "fields", "said"),
    [
        ({"kind": "mse"}, {}, "kind"),
        ({"slots": "some"}, {}, "slots"),
        ({"temperature": 0.0}, {}, "temperature"),
        ({"top": -1}, {}, "top"),
        ({"eta": -1.0}, {}, "eta"),
        ({"ce_weight": -1.0}, {}, "ce_weight"),
        ({"sampled": 1.5}, {}, "sampled"),
        ({"dtype": "int8"}, {}, "dtype"),
        ({"save_dtype": "auto"}, {}, "save_dtype"),
        ({"block_sizes": (1, 4)}, {}, "block_sizes"),
        ({"block_sizes": (99,)}, {}, "block_sizes"),
        ({"head_size": 8}, {}, "head_size"),
        ({}, {"mask_token_id": None}, "mask token"),
        ({}, {"clean_attention": "block"}, "clean_attention"),
    ],
)
def test_settings_that_do_not_go_together_are_named(given: Any, fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Drafter(**given).check(tiny(**fields).config, LENGTH)


def test_a_drafter_needs_a_finished_model_and_leaves_it_alone() -> None:
    with pytest.raises(ValueError, match="init_from"):
        HybridTask(config={}, objective=Drafter())
    with pytest.raises(ValueError, match=r"Drafter.*gradient_checkpointing, compile"):
        HybridTask(init_from="x", objective=Drafter(), gradient_checkpointing=True, compile=True)
