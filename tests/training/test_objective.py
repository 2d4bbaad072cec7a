"""The training loss against a slow reference: one document, one noisy block and one forward at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import MASK, Label, never_mask, raw_logits, texts, tiny
from torch import Tensor

import hybrid.layout
from hybrid import HybridForCausalLM, Layout
from hybrid.law import Law
from hybrid.noise import Noise, Noised, corrupt
from hybrid.training.batch import Batch
from hybrid.training.component import Losses
from hybrid.training.objective import Objective, losses
from hybrid.training.objectives.curriculum import Curriculum
from hybrid.training.text.rows import pack

# Cross-entropies are taken in float32, whatever the model's dtype.
CLOSE = 2e-6


def batch_of(ids: Tensor, target: Tensor | None = None, doc: Tensor | None = None, start: int = 0) -> Batch:
    target = torch.arange(ids.shape[1]).expand_as(ids) > 0 if target is None else target
    doc = torch.zeros_like(ids) if doc is None else doc
    return Batch(input_ids=ids, target=target, doc=doc, index=torch.arange(start, start + len(ids)))


def prompts(count: int = 5, length: int = 13) -> Batch:
    """Rows whose targets begin at different places."""
    ids = torch.tensor(texts(1, [length] * count))
    first = torch.tensor([3, 6, 8, 4, 3])[:count, None]
    return batch_of(ids, torch.arange(length) >= first, start=40)


def packed(first_is_target: bool = False) -> Batch:
    """Rows of several documents, one of them with padding behind. Documents begin in the middle of blocks."""
    doc = torch.tensor([[0] * 6 + [1] * 7, [0] * 13, [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3], [0] * 9 + [-1] * 4])
    ids = torch.tensor(texts(2, [13] * 4))
    inside = torch.cat([torch.zeros(4, 1, dtype=torch.bool), doc[:, 1:] == doc[:, :-1]], 1)
    return batch_of(ids, (inside | first_is_target) & (doc >= 0), doc, start=7)


# --- The loss, slowly ---------------------------------------------------------------------------------------


def documents(doc: list[int]) -> Iterator[list[int]]:
    """The places of each document of a row."""
    for number in sorted(set(doc) - {-1}):
        yield [place for place, own in enumerate(doc) if own == number]


def surprise(logits: Tensor, token: int) -> float:
    return -float(logits.double().log_softmax(-1)[token])


def slow_ar(model: HybridForCausalLM, batch: Batch) -> float:
    """The mean cross-entropy of every target but a document's first token, each document read on its own."""
    found = []
    for ids, target, doc in zip(*(batch[k].tolist() for k in ("input_ids", "target", "doc")), strict=True):  # type: ignore[literal-required]
        for places in documents(doc):
            tokens, labels = [ids[i] for i in places], [(i, i, 0, 0) for i in places]
            logits = never_mask(model, raw_logits(model, tokens, labels))
            found += [surprise(logits[n - 1], tokens[n]) for n in range(1, len(tokens)) if target[places[n]]]
    return sum(found) / len(found)


def slow_view(
    model: HybridForCausalLM, ids: list[int], noisy: list[int], places: list[int], start: int
) -> tuple[list[int], list[Label], list[int]]:
    """Tokens and labels of one noisy block behind the clean text that it may see, and the block's places."""
    clean, size = model.config.clean_attention, model.config.block_size
    before = [] if clean == "full" else [i for i in places if (i if clean == "causal" else i // size * size) < start]
    own = places if clean == "full" else [i for i in places if i in range(start, start + len(noisy))]
    label = {"causal": lambda i: i, "block": lambda i: i // size * size, "full": lambda i: 0}[clean]
    labels = [(i, label(i), 0, 0) for i in before] + [(i, start, 1, 0) for i in own]
    return [ids[i] for i in before] + [noisy[i - start] for i in own], labels, own


def slow_diffusion(model: HybridForCausalLM, batch: Batch, noised: Noised, denominator: str) -> float:
    """The weighted cross-entropy at masked slots, one forward a block."""
    total = weights = 0.0
    skip = noised.begin
    for row, (ids, doc) in enumerate(zip(batch["input_ids"].tolist(), batch["doc"].tolist(), strict=True)):
        tokens, masked, weight = (
            x[row].tolist() for x in (noised.tokens, noised.masked, noised.weight)
        )
        block = noised.layout.block[row].tolist()
        for places in documents(doc):
            for start in sorted({block[i - skip] for i in places if i >= skip}):
                own = [i for i in places if i >= skip and block[i - skip] == start]
                if not any(masked[i - skip] for i in own):
                    continue
                first = 0 if model.config.clean_attention == "full" else start
                end = own[-1] + 1
                noisy = tokens[first - skip : end - skip]
                given, labels, there = slow_view(model, ids, noisy, places, first)
                logits = never_mask(model, raw_logits(model, given, labels))[-len(there) :]
                for n, place in enumerate(there):
                    if masked[place - skip]:
                        # "next": the slot before says it, but nobody stands before the first of a view.
                        source = n - 1 if model.config.diffusion_prediction == "next" and n else n
                        total += weight[place - skip] * surprise(logits[source], ids[place])
                        weights += weight[place - skip]
    return total / (int(batch["target"].sum()) if denominator == "per_token" else weights)


def slow_pair(model: HybridForCausalLM, batch: Batch, noised: Noised, denominator: str) -> float:
    """The same for two complementary views, each taken on its own."""
    width = noised.masked.shape[1] // 2
    views = [
        Noised(
            noised.begin, noised.tokens[:, half], Layout(noised.layout.labels[..., half]), noised.masked[:, half],
            noised.weight[:, half], noised.t[:, half],
        )
        for half in (slice(None, width), slice(width, None))
    ]  # fmt: skip
    if denominator == "per_token":
        return sum(slow_diffusion(model, batch, view, denominator) for view in views)
    sizes = [float(view.weight.sum()) for view in views]
    parts = [slow_diffusion(model, batch, view, denominator) * n for view, n in zip(views, sizes, strict=True) if n]
    return sum(parts) / sum(sizes)


def loss_of(model: HybridForCausalLM, batch: Batch, noise: Noise, seed: int = 1) -> float:
    found = losses(model, batch, Objective(noise=noise), seed).diffusion
    assert found is not None
    return found.item()


def noise_of(model: HybridForCausalLM, batch: Batch, noise: Noise, seed: int) -> Noised:
    return corrupt(
        batch["input_ids"], batch["target"], batch["doc"], batch["index"], noise, model.config, seed
    )


NOISE = {
    "causal": Noise(block_sizes=(3, 5), draft_prob=0.3, canvas_prob=0.3),
    "block": Noise(offset="grid", canvas_prob=0.0, t_per="sequence"),
    "full": Noise(schedule="cosine", t_range=(0.4, 1.0)),  # short rows: with less noise hardly a slot is masked
}


@pytest.mark.parametrize("rows", [prompts, packed])
@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("clean", ["causal", "block", "full"])
@pytest.mark.parametrize("denominator", ["per_token", "pooled"])
def test_the_loss_is_that_of_separate_forwards(
    rows: Callable[[], Batch], prediction: str, clean: str, denominator: Any
) -> None:
    model, batch, noise = tiny(4, clean_attention=clean, diffusion_prediction=prediction), rows(), NOISE[clean]
    model.requires_grad_(False)
    joint = clean == "causal"
    objective = Objective(ar_weight=joint, diffusion_weight=0.3, denominator=denominator, noise=noise)
    objective.check(model.config, 13)
    found, noised = losses(model, batch, objective, seed=5), noise_of(model, batch, noise, 5)
    assert noised.masked.sum() > 10
    diffusion = slow_diffusion(model, batch, noised, denominator)
    assert found.diffusion is not None
    assert float(found.diffusion) == pytest.approx(diffusion, rel=CLOSE)
    total = 0.3 * diffusion
    if joint:
        ar = slow_ar(model, batch)
        assert found.ar is not None
        assert float(found.ar) == pytest.approx(ar, rel=CLOSE)
        total += ar
    assert float(found.total) == pytest.approx(total, rel=CLOSE)


@pytest.mark.parametrize("offset", ["random", "prompt", "grid"])
@pytest.mark.parametrize("seeds", [True, False])
def test_so_it_is_for_every_way_to_place_blocks(offset: Any, seeds: bool) -> None:
    model, noise = tiny(5), Noise(offset=offset, seed_clean=seeds, canvas_prob=0.2, draft_prob=0.5)
    for batch in (prompts(), packed()):
        slow = slow_diffusion(model, batch, noise_of(model, batch, noise, 1), "per_token")
        assert loss_of(model, batch, noise) == pytest.approx(slow, rel=CLOSE)


SETTINGS = {
    "first drafts": Noise(draft_prob=0.6),
    "canvases": Noise(canvas_prob=1.0),
    "clipped": Noise(t_range=(0.4, 0.9)),
    "cosine": Noise(schedule="cosine", t_range=(0.3, 1.0)),
    "one time a sequence": Noise(t_per="sequence"),
    "independent times": Noise(antithetic=False),
    "several sizes": Noise(block_sizes=(2, 5, 13), offset="grid", eps=0.2),
    "complementary": Noise(complementary=True),
    "complementary, all else": Noise(
        complementary=True, draft_prob=0.3, canvas_prob=0.3, seed_clean=False, offset="prompt"
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_so_it_is_for_every_setting(name: str, prediction: str) -> None:
    model, noise, batch = tiny(5, diffusion_prediction=prediction), SETTINGS[name], packed()
    model.requires_grad_(False)
    noise.check(model.config, 13)
    noised = noise_of(model, batch, noise, 1)
    assert noised.masked.sum() > 5
    for denominator in ("per_token", "pooled"):
        slow = (slow_pair if noise.complementary else slow_diffusion)(model, batch, noised, denominator)
        found = losses(model, batch, Objective(noise=noise, denominator=denominator), 1).diffusion  # type: ignore[arg-type]
        assert float(found or 0) == pytest.approx(slow, rel=CLOSE)


@pytest.mark.parametrize("clean", ["block", "full"])
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_complementary_views_go_with_every_kind_of_clean_text(clean: str, prediction: str) -> None:
    model, batch = tiny(5, clean_attention=clean, diffusion_prediction=prediction).requires_grad_(False), packed()
    noise = Noise(complementary=True, offset="grid", canvas_prob=0.0)
    slow = slow_pair(model, batch, noise_of(model, batch, noise, 1), "per_token")
    found = losses(model, batch, Objective(ar_weight=0.0, noise=noise), 1).diffusion
    assert float(found or 0) == pytest.approx(slow, rel=CLOSE)


def test_the_pair_tells_views_that_see_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, noise = tiny(5).requires_grad_(False), packed(), Noise(complementary=True)
    slow = slow_pair(model, batch, noise_of(model, batch, noise, 1), "per_token")
    one_stream = Law.noisy
    monkeypatch.setattr(Law, "noisy", lambda law, starts, doc, stream=1: one_stream(law, starts, doc))
    assert loss_of(model, batch, noise) != pytest.approx(slow, rel=1e-3)


RULES: dict[str, Callable[..., Tensor]] = {
    "a noisy block sees its own clean text": lambda qb, qs, qd, kb, ks, kd: (
        (qd == kd) & (kd >= 0) & (((ks == 0) & (kb < qb + 4 * qs)) | ((kb == qb) & (ks == qs)))
    ),
    "noisy blocks see earlier noisy ones": lambda qb, qs, qd, kb, ks, kd: (
        (qd == kd) & (kd >= 0) & (((ks == 0) & (kb < qb)) | ((kb <= qb) & (ks == qs)))
    ),
    "noisy blocks do not see clean text": lambda qb, qs, qd, kb, ks, kd: (
        (qd == kd) & (kd >= 0) & (((ks == qs) & (kb < qb) & (ks == 0)) | ((kb == qb) & (ks == qs)))
    ),
    "documents see one another": lambda qb, qs, qd, kb, ks, kd: (
        (kd >= 0) & (((ks == 0) & (kb < qb)) | ((kb == qb) & (ks == qs)))
    ),
    "padding is seen": lambda qb, qs, qd, kb, ks, kd: (
        ((qd == kd) | (kd < 0)) & (((ks == 0) & (kb < qb)) | ((kb == qb) & (ks == qs)))
    ),
}


@pytest.mark.parametrize("mutant", RULES)
def test_the_reference_tells_a_wrong_view(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, noise = tiny(6), Noise(offset="grid", canvas_prob=0.0, draft_prob=0.5)
    batch = packed()
    if mutant == "padding is seen":  # which only what stands behind it could do
        batch = {name: value.flip(1) if name == "doc" else value for name, value in packed().items()}  # type: ignore[assignment]
        batch["target"] = batch["target"] & (batch["doc"] >= 0)
    slow = slow_diffusion(model, batch, noise_of(model, batch, noise, 1), "per_token")
    assert loss_of(model, batch, noise) == pytest.approx(slow, rel=CLOSE)
    monkeypatch.setattr(hybrid.layout, "_rule", RULES[mutant])
    assert loss_of(model, batch, noise) != pytest.approx(slow, rel=1e-3)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_reference_tells_a_wrong_alignment(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In-place readings of a next-token model, and readings that reach out of their block."""
    model, noise = tiny(6, diffusion_prediction="next"), Noise(draft_prob=0.5, seed_clean=False)
    slow = slow_diffusion(model, prompts(), noise_of(model, prompts(), noise, 1), "per_token")
    assert loss_of(model, prompts(), noise) == pytest.approx(slow, rel=CLOSE)
    monkeypatch.setattr(Law, "predictions", lambda law, hidden, layout: hidden.roll(shift, 1))
    assert loss_of(model, prompts(), noise) != pytest.approx(slow, rel=1e-3)


# --- Its parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 0.3), (0.25, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_the_total_is_exactly_the_weighted_sum_of_the_parts(weights: tuple[float, float]) -> None:
    model = tiny(7, dtype=torch.float32)
    ar_weight, diffusion_weight = weights
    found = losses(model, prompts(), Objective(ar_weight=ar_weight, diffusion_weight=diffusion_weight), 0)
    assert (found.ar is None) == (ar_weight == 0)
    assert (found.diffusion is None) == (diffusion_weight == 0)
    zero = torch.zeros(())
    parts = (ar_weight * (zero if found.ar is None else found.ar)) + (
        diffusion_weight * (zero if found.diffusion is None else found.diffusion)
    )
    assert torch.equal(found.total, parts)


def test_training_both_changes_neither_part() -> None:
    model, batch = tiny(7), prompts()
    both = losses(model, batch, Objective(), 0)
    ar = losses(model, batch, Objective(diffusion_weight=0.0), 0)
    diffusion = losses(model, batch, Objective(ar_weight=0.0), 0)
    assert both.ar is not None and ar.ar is not None and both.diffusion is not None
    torch.testing.assert_close(both.ar, ar.ar)
    assert torch.equal(both.diffusion, diffusion.diffusion)  # type: ignore[arg-type]


def test_figures_at_masked_slots_are_what_they_are_called() -> None:
    model, batch, noise = tiny(8), prompts(), Noise(draft_prob=0.3, seed_clean=False)
    found, noised = losses(model, batch, Objective(noise=noise), 2), noise_of(model, batch, noise, 2)
    assert found.masked_nll is not None and found.masked_t is not None and found.masked_accuracy is not None
    weight = noised.weight[noised.masked]
    assert len(weight) == len(found.masked_nll)
    targets = int(batch["target"].sum())
    assert float((weight * found.masked_nll).sum() / targets) == pytest.approx(float(found.diffusion or 0), rel=CLOSE)
    assert torch.equal(found.masked_t, noised.t[noised.masked])
    assert not found.masked_nll.requires_grad
    # A model that knows no better than one and the same token is right where that token stands.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    wanted = batch["input_ids"][:, noised.begin :][noised.masked]
    same = losses(model, batch, Objective(noise=noise), 2)
    assert float(same.masked_accuracy or 0) == pytest.approx(float((wanted == 0).float().mean()))
    # The mask token is no answer: 23 tokens are left to choose from.
    torch.testing.assert_close(same.masked_nll, torch.full_like(same.masked_nll, math.log(MASK)))
    assert float(same.ar or 0) == pytest.approx(math.log(MASK))


def test_first_drafts_are_told_apart_by_their_places() -> None:
    """Windows of which nothing is shown, as decoding first sees them; those half shown are easier, and not counted."""
    model, batch, noise = tiny(8), packed(), Noise(draft_prob=0.5, block_sizes=(3, 5))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # it says token 0 everywhere
    found, noised = losses(model, batch, Objective(noise=noise), 2), noise_of(model, batch, noise, 2)
    right: dict[int, list[bool]] = {1: [], 2: [], 3: [], 4: []}
    layout = noised.layout.labels.expand(-1, len(noised.masked), -1)
    for row, (masked, times) in enumerate(zip(noised.masked.tolist(), noised.t.tolist(), strict=True)):
        for i, (position, block) in enumerate(layout[:2, row].t().tolist()):
            if masked[i] and times[i] == 1 and position - block in right:
                right[position - block].append(int(batch["input_ids"][row, position]) == 0)
    assert all(right.values()) and sum(map(sum, right.values())) > 0
    for k, own in right.items():
        part = found.parts[f"draft_accuracy_{k}"]
        assert (int(part.total), int(part.count), part.weight) == (sum(own), len(own), 0.0)
    plain = losses(model, batch, Objective(noise=Noise(block_sizes=(3, 5))), 2)
    assert not any(name.startswith("draft_accuracy") for name in plain.parts)


@pytest.mark.parametrize(("ar_weight", "diffusion_weight"), [(1.0, 0.3), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("rows", [prompts, packed])
def test_logits_that_nobody_reads_are_not_computed(
    ar_weight: float, diffusion_weight: float, rows: Callable[[], Batch]
) -> None:
    model, batch, counted = tiny(9), rows(), [0]

    def count(_module: Any, given: tuple[Tensor, ...]) -> None:
        counted[0] += given[0][..., 0].numel()

    model.lm_head.register_forward_pre_hook(count)
    objective = Objective(ar_weight=ar_weight, diffusion_weight=diffusion_weight)
    losses(model, batch, objective, 3)
    wanted = 0
    if diffusion_weight:
        wanted += int(noise_of(model, batch, objective.noise, 3).masked.sum())
    if ar_weight:
        same = batch["doc"][:, 1:] == batch["doc"][:, :-1]
        wanted += int((batch["target"][:, 1:] & same).sum())
    assert counted[0] == wanted > 0


# --- Documents in one row -----------------------------------------------------------------------------------


def of_document(number: int, ids: Tensor, doc: Tensor, target: Tensor) -> Batch:
    """Only one document is learned: what the loss says is then what it says of that document."""
    return batch_of(ids, target & (doc == number), doc)


@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("clean", ["causal", "block", "full"])
@pytest.mark.parametrize(("learned", "changed"), [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_documents_of_one_row_do_not_influence_one_another(
    prediction: str, clean: str, learned: int, changed: int
) -> None:
    """Rows as `pack` makes them; not one bit of a document's losses changes with another document's tokens."""
    rows = pack([[3, 4, 5, 6], [7, 8, 9, 10, 11], [12, 13, 14, 15, 16]], 17, begin=1)
    ids, doc, target = rows.ids.long(), rows.doc.long(), rows.target
    assert doc[0].tolist() == [0] * 5 + [1] * 6 + [2] * 6
    model = tiny(3, clean_attention=clean, diffusion_prediction=prediction)
    noise = Noise(offset="grid", canvas_prob=0.0, draft_prob=1.0, seed_clean=None if clean == "causal" else False)
    objective = Objective(ar_weight=float(clean == "causal"), noise=noise)

    def loss(tokens: Tensor) -> Losses:
        return losses(model, of_document(learned, tokens, doc, target), objective, 0)

    before = loss(ids)
    after = loss(torch.where(doc == changed, (ids + 5) % MASK, ids))
    assert before.masked_nll is not None and len(before.masked_nll) >= 2
    assert torch.equal(before.masked_nll, after.masked_nll)  # type: ignore[arg-type]
    assert torch.equal(before.total, after.total)
    # The same change inside the document does tell.
    assert not torch.equal(before.total, loss(torch.where(doc == learned, (ids + 5) % MASK, ids)).total)


GRADIENTS = {
    "default": ("causal", Noise(draft_prob=0.5)),
    "canvas": ("causal", Noise(canvas_prob=1.0, seed_clean=False)),
    "complementary": ("causal", Noise(complementary=True, offset="grid", canvas_prob=0.0)),
    "prompt": ("causal", Noise(offset="prompt", block_sizes=(3, 7))),
    "block": ("block", Noise(offset="grid", canvas_prob=0.0, draft_prob=0.5)),
    "full": ("full", Noise(t_range=(0.5, 1.0))),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
@pytest.mark.parametrize("learned", [0, 1, 2])
def test_no_gradient_reaches_another_document_in_either_stream(kind: str, prediction: str, learned: int) -> None:
    clean, noise = GRADIENTS[kind]
    rows = pack([[3, 4, 5, 6], [7, 8, 9, 10, 11], [12, 13, 14, 15, 16]], 17, begin=1)
    ids, doc = rows.ids.long(), rows.doc.long()
    model = tiny(3, clean_attention=clean, diffusion_prediction=prediction)
    batch = of_document(learned, ids, doc, rows.target)
    read: list[Tensor] = []

    def keep(_module: Any, _given: Any, out: Tensor) -> None:
        out.retain_grad()
        read.append(out)

    model.model.embed_tokens.register_forward_hook(keep)
    objective = Objective(ar_weight=float(clean == "causal"), noise=noise)
    losses(model, batch, objective, 2).total.backward()
    noised = noise_of(model, batch, noise, 2)
    streams = {"clean": doc, "noisy": noised.layout.doc}
    if clean == "full":
        del streams["clean"]
    gradients = read[0].grad
    assert gradients is not None
    for name, labels in streams.items():
        own, gradients = gradients[:, : labels.shape[1]], gradients[:, labels.shape[1] :]
        assert not own[labels != learned].any(), name
        assert own[labels == learned].any(), name
    assert gradients.shape[1] == 0


# --- Padding by EOS -----------------------------------------------------------------------------------------

END = 5


def ended(tails: list[int], length: int = 13) -> Batch:
    """Responses of random tokens without END, each with an END behind it, and so many more up to the row's end."""
    ids = torch.tensor(texts(21, [length] * len(tails)))
    ids[ids == END] = 6
    for row, tail in zip(ids, tails, strict=True):
        row[length - tail - 1 :] = END
    return batch_of(ids)


def by_hand(model: HybridForCausalLM, batch: Batch, objective: Objective, share: Tensor) -> tuple[float, float]:
    """Both parts in float64, with what each token counts."""
    logits = model(batch["input_ids"]).logits[..., :MASK].double().log_softmax(-1)
    ar = -logits[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    noised = noise_of(model, batch, objective.noise, 0)
    found = losses(model, batch, objective, 0)
    assert found.masked_nll is not None
    wanted = share[:, noised.begin :][noised.masked].double() * noised.weight[noised.masked]
    # The cross-entropies themselves are tested above.
    return float((share[:, 1:] * ar).sum() / share[:, 1:].sum()), float(
        (wanted * found.masked_nll).sum() / (share * batch["target"]).sum()
    )


@pytest.mark.parametrize("together", [1.0, 0.0, 2.5, None])
def test_padding_counts_together_as_so_many_tokens(together: float | None) -> None:
    model = tiny(2, eos_token_id=END).requires_grad_(False)
    tails = [0, 1, 4, 9]
    batch = ended(tails)
    share = torch.ones(4, 13)
    for row, tail in enumerate(tails):
        share[row, 13 - tail :] = 1.0 if together is None else min(1.0, together / max(tail, 1))
    objective = Objective(eos_padding_weight=together, noise=Noise(draft_prob=0.5))
    ar, diffusion = by_hand(model, batch, objective, share)
    found = losses(model, batch, objective, 0)
    assert float(found.ar or 0) == pytest.approx(ar, rel=CLOSE)
    assert float(found.diffusion or 0) == pytest.approx(diffusion, rel=CLOSE)


@pytest.mark.parametrize("tail", [3, 8, 40])
def test_the_share_of_eos_in_the_loss_is_bounded_however_long_the_padding(tail: int) -> None:
    """Of 10 tokens and an END, the END and all padding behind it are 2 of 12, not 41 of 51."""
    model = tiny(2, eos_token_id=END, dtype=torch.float32, max_position_embeddings=64)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # each token costs the same, so shares of the loss are shares of the weight
    batch = ended([tail], length=12 + tail)
    objective = Objective(noise=Noise(draft_prob=1.0, canvas_prob=0.0, seed_clean=False))
    end = batch["input_ids"] == END
    only = Batch(**{**batch, "target": batch["target"] & end})
    every = replace(objective, eos_padding_weight=None)

    def shares(how: Objective) -> tuple[float, float]:
        """Of END in each part: the part's own sum over the targets, END's over all."""
        whole, ends = (losses(model, b, how, 0) for b in (batch, only))
        weights = [_count(b, how) for b in (batch, only)]
        return tuple(  # type: ignore[return-value]
            float(getattr(ends, part)) * weights[1] / (float(getattr(whole, part)) * weights[0])
            for part in ("ar", "diffusion")
        )

    assert shares(objective) == pytest.approx((2 / 12, 2 / 12), rel=1e-4)
    assert shares(every) == pytest.approx(((tail + 1) / (tail + 11),) * 2, rel=1e-4)


def _count(batch: Batch, objective: Objective) -> float:
    ends = int((batch["target"] & (batch["input_ids"] == END)).sum())
    rest = int(batch["target"].sum()) - ends
    return rest + (ends if objective.eos_padding_weight is None else 2)


def test_an_end_of_each_document_is_no_padding() -> None:
    """Packed texts may each begin and end with the same token, which then stands twice."""
    model = tiny(2, eos_token_id=END).requires_grad_(False)
    ids = torch.tensor([[END, 3, 4, END, END, 7, 8, END, END, 9]])
    doc = torch.tensor([[0] * 4 + [1] * 4 + [2] * 2])
    batch = batch_of(ids, torch.ones_like(doc, dtype=torch.bool), doc)
    whole, each = (losses(model, batch, Objective(eos_padding_weight=w), 0).total for w in (0.5, None))
    assert torch.equal(whole, each)


# --- z-loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_the_z_loss_is_the_mean_square_of_log_z(weights: tuple[float, float]) -> None:
    model, batch = tiny(7), prompts()
    noise = Noise(canvas_prob=0.0, offset="grid", draft_prob=0.4)
    without = Objective(ar_weight=weights[0], diffusion_weight=weights[1], noise=noise)
    found, plain = (losses(model, batch, replace(without, z_loss=z), 3) for z in (0.1, 0.0))
    wanted = []
    ids, places = batch["input_ids"], torch.arange(13)[None]
    if weights[0]:
        logits = model(ids).logits[:, :-1, :MASK]
        wanted.append(logits[batch["target"][:, 1:]].exp().sum(-1).log() ** 2)
    if weights[1]:
        noised = noise_of(model, batch, noise, 3)
        layout = Layout.causal(places).cat(noised.layout)
        logits = model(torch.cat([ids, noised.tokens], 1), layout=layout).logits[:, 13:, :MASK]
        wanted.append(logits[noised.masked].exp().sum(-1).log() ** 2)
    z = float(torch.cat(wanted).double().mean())
    assert float(found.z or 0) == pytest.approx(z, rel=CLOSE)
    assert float(found.total) == pytest.approx(float(plain.total) + 0.1 * z, rel=CLOSE)
    assert plain.z is None
    found.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- Learning -----------------------------------------------------------------------------------------------


# Noise in which no two texts have the same masks, where it matters.
def fitted(model: HybridForCausalLM, batch: Batch, objective: Objective, steps: int) -> Losses:
    """The losses after some steps of AdamW on one batch, whose noise is the same in every step."""
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        adam.zero_grad()
        losses(model, batch, objective, 3).total.backward()
        adam.step()
    with torch.no_grad():
        return losses(model, batch, objective, 3)


@pytest.mark.parametrize(
    ("clean", "weights"),
    [("causal", (1.0, 0.3)), ("causal", (1.0, 0.0)), ("full", (0.0, 1.0))],
    ids=["joint", "left to right", "masked"],
)
def test_objectives_overfit_to_their_floor(clean: str, weights: tuple[float, float]) -> None:
    ids = torch.tensor(texts(11, [32] * 8))
    ids[:, 0] = 0  # all texts begin alike: which one it is takes ln 8 nats to say, and after that nothing
    assert len(set(map(tuple, ids.tolist()))) == 8
    model = tiny(
        12, dtype=torch.float32, clean_attention=clean, hidden_size=64, intermediate_size=128, initializer_range=0.1
    ).train()
    objective = Objective(ar_weight=weights[0], diffusion_weight=weights[1])
    found = fitted(model, batch_of(ids), objective, 70)
    if weights[0]:
        floor = math.log(8) / 31
        assert floor - 1e-3 < float(found.ar or 0) < floor + 0.1
    if weights[1]:
        # The places of the masks tell the texts apart, so that nothing is left to guess.
        assert 0 < float(found.diffusion or 0) < 0.1
        assert float(found.masked_accuracy or 0) > 0.99


# --- Complaints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "fields", "said"),
    [
        (Objective(ar_weight=-1.0), {}, "ar_weight and diffusion_weight"),
        (Objective(diffusion_weight=-0.1), {}, "ar_weight and diffusion_weight"),
        (Objective(ar_weight=0.0, diffusion_weight=0.0), {}, "ar_weight and diffusion_weight"),
        (Objective(denominator="mean"), {}, "denominator is 'mean'"),  # type: ignore[arg-type]
        (Objective(), {"clean_attention": "block"}, "ar_weight is 1.0.*clean_attention='block'"),
        (Objective(), {"clean_attention": "full"}, "ar_weight is 1.0.*clean_attention='full'"),
        (Objective(), {"mask_token_id": None}, "diffusion_weight.*mask_token_id"),
        (Objective(noise=Noise(eps=2.0)), {}, "eps is 2.0"),
        (Objective(ar_first=1.0), {}, "ar_first is 1.0"),
        (Objective(ar_first=0.5, diffusion_weight=0.0), {}, "ar_first is 0.5: two stages"),
        (Objective(z_loss=-1e-4), {}, "z_loss is -0.0001"),
        (Objective(eos_padding_weight=-1.0), {}, "eos_padding_weight is -1.0"),
        (Objective(curriculum=Curriculum(stable=33)), {}, "curriculum has block sizes .*33.*32"),
        (Objective(curriculum=Curriculum(stable=8, decay=(0,))), {}, "curriculum has block sizes"),
        (Objective(curriculum=Curriculum(stable=8, warmup_share=0.0)), {}, "warmup_share and decay_share are"),
        (Objective(curriculum=Curriculum(stable=8, warmup_share=0.7, decay_share=0.5)), {}, "together"),
        (Objective(curriculum=Curriculum(stable=8), diffusion_weight=0.0), {}, "curriculum.*diffusion_weight=0"),
        (Objective(curriculum=Curriculum(stable=8), noise=Noise(block_sizes=(4,))), {}, "give one of them"),
        (Objective(curriculum=Curriculum(stable=8), ar_weight=0.0), {"clean_attention": "full"}, "curriculum.*full"),
        (Objective(curriculum=Curriculum(stable=1), noise=Noise(canvas_prob=0.0)), {}, "nothing of a block of one"),
        (Objective(noise=Noise(block_sizes=(99,))), {}, "block_sizes is .*99"),
    ],
)
def test_settings_that_do_not_go_together_are_named(
    objective: Objective, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        objective.check(tiny(0, **fields).config, 32)


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        (Objective(), {}),
        (Objective(diffusion_weight=0.0), {"mask_token_id": None}),
        (Objective(diffusion_weight=0.0, noise=Noise(eps=2.0)), {}),  # there is no noise
        (Objective(ar_weight=0.0), {"clean_attention": "full"}),
        (Objective(ar_weight=0.0, noise=NOISE["block"]), {"clean_attention": "block"}),
    ],
)
def test_settings_that_go_together_pass(objective: Objective, fields: dict[str, Any]) -> None:
    objective.check(tiny(0, **fields).config, 32)


def test_a_pure_left_to_right_model_trains() -> None:
    model = tiny(1, mask_token_id=None)
    found = losses(model, prompts(), Objective(diffusion_weight=0.0), 0)
    assert float(found.total) == pytest.approx(slow_ar(model, prompts()), rel=CLOSE)
    assert list(found.parts) == ["ar"]
    assert replace(found, parts={}, slots=0, logits=0) == Losses()


def test_clean_text_alone_takes_the_fast_path() -> None:
    """Rows without packing or padding keep the layout that needs no mask, and say the same as the rule."""
    ids = torch.tensor(texts(3, [10, 10]))
    model = tiny(2)
    slow = model(ids, layout=Layout(Layout.causal(torch.arange(10)[None]).labels)).logits
    expected = torch.nn.functional.cross_entropy(slow[:, :-1, :MASK].flatten(0, 1), ids[:, 1:].flatten())
    found = losses(model, batch_of(ids), Objective(diffusion_weight=0.0), 0).total
    assert float(found) == pytest.approx(float(expected), rel=CLOSE)


def test_bits_per_byte_are_of_what_is_a_mean_over_targets() -> None:
    means = {"loss": 5.0, "ar": 2.0, "diffusion": 3.0}
    both = {"ar_bits_per_byte": 1.0, "diffusion_bits_per_byte": 1.5}
    assert Objective().figures(means, 0.5) == means | both
    assert Objective().figures({"loss": 5.0, "ar": 2.0}, 0.5) == {"loss": 5.0, "ar": 2.0, "ar_bits_per_byte": 1.0}
    assert Objective(denominator="pooled").figures(means, 0.5) == means | {"ar_bits_per_byte": 1.0}
    assert Objective().figures(means, None) == means
