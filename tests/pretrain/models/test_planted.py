"""The contract's own test: an honest mixer passes every check, and each way of being broken fails the one named."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from potamos.parallel.facts import Traits
from potamos.pretrain.models.interfaces import Mixer, Out, Seq, State
from potamos.pretrain.models.linear import Linear

WIDTH = 16


class Core(nn.Module):
    precision = "float32"
    tags: ClassVar[dict[str, int]] = {"decay": 0}
    opt: ClassVar[dict[str, dict[str, Any]]] = {"decay": {"decay": False}}

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.empty(WIDTH))

    def draw(self, name: str, parameter: Tensor, generator: torch.Generator, std: float, layers: int) -> None:
        del name, std, layers
        parameter.uniform_(0.5, 2.0, generator=generator)

    def forward(self, u: Tensor, resets: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, L, D), resets (B, L), memory (B, D) -> (y, memory after the last token)."""
        rate, out = self.decay.sigmoid(), []
        for t in range(u.shape[1]):
            memory = rate * torch.where(resets[:, t, None], 0.0, memory) + (1 - rate) * u[:, t]
            out.append(memory)
        return torch.stack(out, 1), memory


class Honest(Mixer):
    """A decaying average of each document so far; the state is (memory (B, D), document (B,))."""

    traits = Traits(shard="channel", cp=("a2a",), units=WIDTH, carries=True)

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.core = Linear(WIDTH, WIDTH, role="column"), Core()
        self.out = Linear(WIDTH, WIDTH, role="row")

    def resets(self, seq: Seq, shape: torch.Size, state: State) -> tuple[Tensor, Tensor]:
        """(B, L) where a document begins, and the last document (B,)."""
        before = None if state is None else state[1]
        if seq.document_ids is None:
            last = torch.zeros(shape[0], dtype=torch.int32) if before is None else before
            return torch.zeros(shape[:2], dtype=torch.bool), last
        ids = seq.document_ids
        first = torch.full_like(ids[:, :1], -2) if before is None else before[:, None]
        return ids != torch.cat([first, ids[:, :-1]], 1), ids[:, -1]

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        u = self.inputs(x)
        resets, document = self.resets(seq, x.shape, state)
        memory = u.new_zeros(len(x), WIDTH) if state is None else state[0]
        y, memory = self.core(u, resets, memory)
        return Out(self.out(y), state=(memory, document))

    def mixing_flops(self, length: int) -> float:
        return 3.0 * WIDTH


class LooksAhead(Honest):
    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state)
        out.hidden = out.hidden + 1e-6 * torch.cat([x[:, 1:], x[:, -1:]], 1)
        return out


class LeaksForward(Honest):
    """Causal, but blind to documents."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        return super().forward(x, Seq(seq.positions), state)


class LeaksALittle(Honest):
    """The first token of a document is mixed with the token before it."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state)
        out.hidden = out.hidden + 1e-9 * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return out


class ForgetsState(Honest):
    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        return super().forward(x, seq, None)


class DetachesState(Honest):
    """Right outputs, wrong gradients."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state)
        out.state = (out.state[0].detach(), out.state[1])
        return out


class StaleStep(Honest):
    """The recurrent form hands on the state that it was given."""

    def step(self, x: Tensor, seq: Seq, state: State) -> Out:
        out = super().step(x, seq, state)
        out.state = state
        return out


class CrossesInStep(Honest):
    """The recurrent form does not notice a new document."""

    def step(self, x: Tensor, seq: Seq, state: State) -> Out:
        out = self.forward(x, Seq(seq.positions), state)
        out.state = (out.state[0], seq.document_ids[:, -1] if seq.document_ids is not None else out.state[1])
        return out


class CrossesSegments(Honest):
    """A document that begins with a segment goes on with the state of the one before."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        if state is not None and seq.document_ids is not None:
            state = (state[0], seq.document_ids[:, 0])
        return super().forward(x, seq, state)


class Remembers(Honest):
    """State beside the state: the second call with the same arguments differs."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state if state is not None else getattr(self, "last", None))
        self.last = out.state
        return out


class WritesState(Honest):
    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state)
        if state is not None:
            with torch.no_grad():
                state[0].mul_(1.5)
        return out


class BatchLast(Honest):
    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, None if state is None else (state[0].T, state[1]))
        out.state = (out.state[0].T, out.state[1])
        return out


class MixesRowsInState(Honest):
    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, None if state is None else (state[0].flip(0), state[1]))
        out.state = (out.state[0].flip(0), out.state[1])
        return out


class ChangesStructure(Honest):
    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, None if state is None else tuple(state)[:2])
        out.state = (*out.state, out.state[1]) if x.shape[1] > 1 else out.state
        return out


class SaysNothingOfState(Honest):
    traits = Traits(shard="channel", cp=("a2a",), units=WIDTH)


class Silent(Honest):
    """A parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = Linear(WIDTH, WIDTH)


class WrongGradient(Honest):
    """The output depends on a parameter by a way that autograd does not see."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state)
        out.hidden = out.hidden * (1 + self.out.bias.detach())  # pyright: ignore[reportOptionalMemberAccess]
        return out


class SinglePrecision(Honest):
    """Rounds to fp32 on the way."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        if state is not None:
            state = (state[0].float().to(x.dtype), state[1])
        return super().forward(x, seq, state)


class Overflows(Honest):
    """Finite in fp32, not with bf16 products."""

    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state)
        if self.inputs.compute == torch.bfloat16:
            out.hidden = out.hidden / 0
        return out


class WithoutTags(Core):
    tags: ClassVar[dict[str, int]] = {}


class WithUnknownFact(Core):
    opt: ClassVar[dict[str, dict[str, Any]]] = {"dekay": {"decay": False}}


class WithThirdDimension(Core):
    tags: ClassVar[dict[str, int]] = {"decay": 2}


class UntaggedCore(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.core = WithoutTags()


class UnknownFact(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.core = WithUnknownFact()


class ThirdDimension(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.core = WithThirdDimension()


class Free(Honest):
    def mixing_flops(self, length: int) -> float:
        return 0.0


class Shrinks(Honest):
    def forward(self, x: Tensor, seq: Seq, state: State = None) -> Out:
        out = super().forward(x, seq, state)
        out.hidden = out.hidden[:, :-1]
        return out


class Buffered(Honest):
    """A value that a checkpoint of parameters would lose."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("cpu"):
            self.register_buffer("scale", torch.ones(()))


PLANTED = [
    (LooksAhead, "causality"),
    (LeaksForward, "isolation"),
    (LeaksForward, "packing"),
    (LeaksALittle, "isolation"),
    (ForgetsState, "splits"),
    (ForgetsState, "steps"),
    (DetachesState, "splits"),
    (DetachesState, "steps"),
    (StaleStep, "steps"),
    (CrossesInStep, "steps"),
    (CrossesSegments, "splits"),
    (SinglePrecision, "splits"),
    (Remembers, "shapes"),
    (WritesState, "state"),
    (BatchLast, "state"),
    (MixesRowsInState, "state"),
    (ChangesStructure, "state"),
    (SaysNothingOfState, "state"),
    (Silent, "gradients"),
    (WrongGradient, "gradients"),
    (Overflows, "bf16"),
    (Buffered, "state_dict"),
    (UntaggedCore, "facts"),
    (UnknownFact, "facts"),
    (ThirdDimension, "facts"),
    (Free, "flops"),
    (Shrinks, "shapes"),
]


def make(contract: ModuleType, kind: type[Honest]) -> Any:
    with torch.device("meta"):
        subject = contract.Subject(kind())
    return contract.fill(subject)


def test_an_honest_mixer_passes(contract: ModuleType, check: Any) -> None:
    check(make(contract, Honest))


@pytest.mark.parametrize(("kind", "name"), PLANTED, ids=[f"{kind.__name__}-{name}" for kind, name in PLANTED])
def test_a_broken_mixer_fails(contract: ModuleType, kind: type[Honest], name: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(contract, f"check_{name}")(make(contract, kind))


def test_every_check_has_a_planted_bug(contract: ModuleType) -> None:
    planted = {f"check_{name}" for _, name in PLANTED}
    assert {check.__name__ for check in contract.CHECKS} - planted == {"check_segment_state"}
