"""Fused scores and cross-entropy against the definition: value and both gradients, wherever rows are cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from potamos.kernels import cross_entropy
from potamos.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
WIDTH, VOCABULARY = 12, 37


def make(rows: int, dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-variance hidden states, scores of standard deviation about 3, and targets with gaps."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -1
    if ignored < 1:
        targets[0], targets[-1] = 0, VOCABULARY - 1  # the ends of the vocabulary
    return hidden.to(dtype), weight.to(dtype), targets


def run(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, targets)
    d_hidden, d_weight = torch.autograd.grad(scale * value, [hidden, weight])
    return {"value": value.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


def check(loss: Loss, rows: int, assert_close: Any, scale: float = 1.0) -> None:
    """Equal to the definition in fp64, to 1e-12."""
    arguments = make(rows)
    want = run(linear_cross_entropy_reference, *arguments, scale=scale)
    for name, got in run(loss, *arguments, scale=scale).items():
        assert_close(got, want[name], 1e-12, name)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Sixteen rows at a time."""
    monkeypatch.setitem(cross_entropy._CHUNK_ROWS, "cpu", 16)
    return 16


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 50])
def test_chunks_are_invisible(rows: int, small_chunks: int, assert_close: Any) -> None:
    check(linear_cross_entropy, rows, assert_close)


def test_one_chunk(assert_close: Any) -> None:
    check(linear_cross_entropy, 50, assert_close)
    check(linear_cross_entropy, 50, assert_close, scale=-2.5)


def test_scores_of_one_chunk_are_all_there_ever_is(monkeypatch: pytest.MonkeyPatch, assert_close: Any) -> None:
    """Never more rows at once than a chunk holds: seen through the log-sum-exp of each."""
    monkeypatch.setitem(cross_entropy._CHUNK_ROWS, "cpu", 20)
    seen, product = [], Tensor.logsumexp

    def spy(self: Tensor, *arguments: Any) -> Tensor:
        seen.append(len(self))
        return product(self, *arguments)

    monkeypatch.setattr(Tensor, "logsumexp", spy)
    run(linear_cross_entropy, *make(50))
    assert seen == [20, 20, 10]


def test_value_is_minus_log_probability() -> None:
    hidden, weight, targets = make(9)
    probabilities = (hidden @ weight.T).exp()
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    expected = -sum(math.log(probabilities[i, t]) for i, t in enumerate(targets.tolist()) if t >= 0)
    assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(expected, rel=1e-12)


def test_gradcheck(small_chunks: int) -> None:
    hidden, weight, targets = make(19)
    arguments = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), arguments, fast_mode=True)


def test_ignored_rows_add_nothing(small_chunks: int) -> None:
    """Their hidden states change no bit, whatever the negative number, and get exactly no gradient."""
    hidden, weight, targets = make(40)
    first = run(linear_cross_entropy, hidden, weight, targets)
    ignored = targets < 0
    assert 3 < int(ignored.sum()) < 37
    changed, other = hidden.clone(), targets.clone()
    changed[ignored] = torch.randn(int(ignored.sum()), WIDTH, dtype=torch.float64)
    other[ignored] = -100
    second = run(linear_cross_entropy, changed, weight, other)
    assert torch.equal(first["value"], second["value"])
    assert torch.equal(first["d_weight"], second["d_weight"])
    assert torch.equal(first["d_hidden"], second["d_hidden"])
    assert torch.count_nonzero(first["d_hidden"][ignored]) == 0


@pytest.mark.parametrize("rows", [3, 40])
def test_all_ignored_is_exactly_zero(rows: int, small_chunks: int) -> None:
    found = run(linear_cross_entropy, *make(rows, ignored=1.1))
    assert all(torch.count_nonzero(value) == 0 for value in found.values())


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, targets = make(20)
    want = run(linear_cross_entropy_reference, hidden, weight, targets)
    for frozen in ("d_hidden", "d_weight"):
        h, w = hidden.clone().requires_grad_(frozen != "d_hidden"), weight.clone().requires_grad_(frozen != "d_weight")
        linear_cross_entropy(h, w, targets).backward()
        got, none = (h.grad, w.grad) if frozen == "d_weight" else (w.grad, h.grad)
        assert none is None
        torch.testing.assert_close(got, want["d_weight" if frozen == "d_hidden" else "d_hidden"], rtol=0, atol=1e-12)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(want["value"].item(), rel=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float, small_chunks: int, assert_close: Any) -> None:
    """Near fp64 of the same rounded inputs, and no further from it than twice the definition in that dtype."""
    arguments = make(50, dtype)
    hidden, weight, targets = arguments
    exact = run(linear_cross_entropy_reference, hidden.double(), weight.double(), targets)
    plain = run(linear_cross_entropy_reference, *arguments)
    found = run(linear_cross_entropy, *arguments)
    assert found["value"].dtype == torch.float32
    assert found["d_hidden"].dtype == found["d_weight"].dtype == dtype
    for name, want in exact.items():
        assert_close(found[name], want, tolerance, name)
        error, allowed = ((x[name].double() - want).norm() for x in (found, plain))
        assert error <= 2 * allowed + 1e-7 * want.norm(), name


def test_large_scores_do_not_overflow(small_chunks: int, assert_close: Any) -> None:
    """Scores in the thousands, where exp would be infinite even in fp64."""
    hidden, weight, targets = make(40)
    arguments = (hidden * 1000, weight, targets)
    want = run(linear_cross_entropy_reference, *arguments)
    for name, got in run(linear_cross_entropy, *arguments).items():
        assert got.isfinite().all()
        assert_close(got, want[name], 1e-12, name)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"),
    [((4, 3), (5, 2), (4,)), ((4, 3), (5, 3), (3,)), ((2, 4, 3), (5, 3), (2, 4)), ((4, 3), (5, 3), (4, 1))],
)
def test_shapes_that_do_not_fit_are_named(hidden: tuple, weight: tuple, targets: tuple) -> None:
    with pytest.raises(ValueError, match=r"must be \(N, D\), \(V, D\) and \(N,\)"):
        linear_cross_entropy(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64))


# --- the comparison itself: each of these must fail it ---------------------------------------------------------------


def _shifted(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_reference(hidden, weight, targets.roll(1))


def _mean(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_reference(hidden, weight, targets) / (targets >= 0).sum()


def _counts_ignored(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_reference(hidden, weight, targets.clamp(min=0))


def _forgets_last_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    whole = len(hidden) // 16 * 16
    return linear_cross_entropy_reference(hidden[:whole], weight, targets[:whole])


def _without_scores_of_others(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """No log-sum-exp."""
    valid = targets >= 0
    return -(hidden * weight[targets.clamp(min=0)]).sum(1)[valid].sum()


def _half_gradient(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Right value; the weight's gradient misses the targets' own rows."""
    lse = (hidden @ weight.T).logsumexp(1)
    picked = (hidden * weight.detach()[targets.clamp(min=0)]).sum(1)
    return torch.where(targets >= 0, lse - picked, 0).sum()


def _rounds(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy_reference(hidden.float(), weight.float(), targets).double()


@pytest.mark.parametrize(
    "wrong",
    [_shifted, _mean, _counts_ignored, _forgets_last_rows, _without_scores_of_others, _half_gradient, _rounds],
)
def test_planted_bugs_fail(wrong: Loss, assert_close: Any) -> None:
    check(linear_cross_entropy_reference, 50, assert_close)
    with pytest.raises(AssertionError):
        check(wrong, 50, assert_close)
