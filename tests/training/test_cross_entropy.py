"""Cross-entropy in slices, against torch's own on whole float64 logits, and against differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.training.objectives import cross_entropy as module
from hybrid.training.objectives.cross_entropy import cross_entropy


def given(rows: int, words: int = 11, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, words, generator=source, dtype=torch.float64)).to(dtype).requires_grad_()
    return logits, torch.randint(1, words, (rows,), generator=source)


def plain(logits: Tensor, wanted: Tensor, never: int | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.double()
    if never is not None:
        wide = wide.index_fill(1, torch.tensor([never]), -torch.inf)
    return F.cross_entropy(wide, wanted, reduction="none"), wide.logsumexp(1), wide.argmax(1)


@pytest.fixture(autouse=True)
def slices_of_128_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.AT_A_TIME, "cpu", 128 * 11)


@pytest.mark.parametrize("never", [None, 0])
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 300])
@pytest.mark.parametrize(
    ("dtype", "atol", "grad_atol"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-6), (torch.bfloat16, 1e-5, 4e-3)],
)
def test_it_says_what_torch_says(
    dtype: torch.dtype, atol: float, grad_atol: float, rows: int, never: int | None
) -> None:
    logits, wanted = given(rows, dtype=dtype)
    weights = torch.rand(2, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    results = [call(logits, wanted, never) for call in (cross_entropy, plain)]
    for nll, log_z, _ in results:
        total = (weights[0] * nll).sum() + (weights[1] * log_z**2).sum() / 8
        grads.append(torch.autograd.grad(total, logits)[0].double())
    for ours, theirs in zip(*(found[:2] for found in results), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=atol, rtol=0)
    assert torch.equal(results[0][2], results[1][2])
    torch.testing.assert_close(*grads, atol=grad_atol, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_its_gradient_is_that_of_differences() -> None:
    logits, wanted = given(5, words=4)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, wanted, 0)[:2], logits)


@pytest.mark.parametrize("at_a_time", [1, 7 * 11])
def test_rows_do_not_depend_on_where_they_are_cut(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, wanted = given(50, dtype=torch.float32)
    whole = cross_entropy(logits, wanted)
    monkeypatch.setitem(module.AT_A_TIME, "cpu", at_a_time)
    for one, other in zip(whole, cross_entropy(logits, wanted), strict=True):
        assert torch.equal(one, other)


def test_logits_stay_as_they_are() -> None:
    logits, wanted = given(9, dtype=torch.float32)
    before = logits.detach().clone()
    cross_entropy(logits, wanted, 0)[0].sum().backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    logits, wanted = given(3)
    with torch.no_grad():
        logits[1, 4] = bad
    nll, log_z, _ = cross_entropy(logits, wanted)
    assert nll.isfinite().tolist() == log_z.isfinite().tolist() == [True, False, True]
