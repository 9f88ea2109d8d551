"""What a stage keeps of a micro-batch once its gradients are another's business: numbers, and no graph."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from potamos.parallel.pipeline import Part
from potamos.pretrain.objectives.base import Handover, Term, Terms


class Square(nn.Module):
    """x -> the sum of x^2, or x^2 to be sent; remembers what its graph holds."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.ones(3)), last
        self.held: weakref.ref[torch.UntypedStorage] | None = None

    def forward(self, batch: Tensor, received: tuple[Tensor, ...], state: None) -> Terms | Handover:
        del received, state
        x = batch * self.weight
        squared = x * x.clone()  # the product keeps both
        self.held = weakref.ref(x.untyped_storage())
        return Terms({"causal": Term(squared.sum(), "tokens")}) if self.last else Handover((squared,))


@pytest.mark.parametrize("last", [True, False])
def test_a_stage_keeps_numbers_and_no_graph(last: bool) -> None:
    """As torch's schedules do, which cut the graph at what a stage returns, and cannot where that is a view."""
    module = Square(last=last)
    part = Part(module, last=last)
    part.batches, part.states, part.loss = [torch.ones(3)], [None], lambda terms: terms.terms["causal"].sum
    out = part(micro=torch.tensor(0))
    (out,) = (out,) if last else out
    assert module.held is not None
    assert module.held() is not None
    assert not out._is_view()
    out.detach_()
    assert module.held() is None
    if last:
        assert (out.shape, part.results[0].terms["causal"].sum.item()) == ((1,), 3.0)
    else:
        assert part.results[0].sent == ()


def test_scoring_keeps_what_the_next_stage_receives() -> None:
    part = Part(Square(last=False), last=False)
    part.batches, part.states = [torch.ones(3)], [None]
    with torch.no_grad():
        part(micro=torch.tensor(0))
    assert part.results[0].sent[0].tolist() == [1.0, 1.0, 1.0]
