"""The trunk: a block, and the model that is frontend plus stack. It knows interfaces only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from potamos.kernels.dropout import dropout
from potamos.parallel.facts import IDENTITY, Axis
from potamos.pretrain.models.interfaces import (
    AttentionPositions,
    ChannelMixer,
    Frontend,
    Mixer,
    Out,
    Region,
    Seq,
    Stack,
    State,
)
from potamos.pretrain.models.linear import Linear, Norm, NormOptions


class Block(nn.Module):
    """Residual block: hidden + mixer(norm(hidden)), then + channel(norm(hidden)); norms before or after the sums.

    ``channel`` is None where the mixer replaces it. Dropout acts on what each sub-layer adds.
    """

    tp: Axis = IDENTITY

    def __init__(
        self,
        mixer: Mixer,
        channel: ChannelMixer | None,
        *,
        width: int,
        layer: int,
        norm: NormOptions,
        residual_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer, self.pre, self.residual_dropout = layer, norm.place == "pre", residual_dropout
        self.mixer_norm, self.mixer = Norm(width, norm), mixer
        self.channel_norm, self.channel = (Norm(width, norm), channel) if channel is not None else (None, None)

    def forward(self, hidden: Tensor, seq: Seq, state: State = None, *, step: bool = False) -> Out:
        """hidden (B, L, D); with ``step``, L = 1 and the mixer's recurrent form."""
        mix = self.mixer.step if step else self.mixer
        mixed = mix(self.mixer_norm(hidden) if self.pre else hidden, seq, state)
        hidden = self._add(hidden, mixed.hidden, seq, "mixer", self.mixer_norm)
        out = Out(hidden, mixed.columns, mixed.state, mixed.streams, mixed.aux, mixed.taps)
        if self.channel is not None and self.channel_norm is not None:
            seq = seq.with_streams(mixed.streams)
            fed = self.channel(self.channel_norm(hidden) if self.pre else hidden, seq)
            out.hidden = self._add(hidden, fed.hidden, seq, "channel", self.channel_norm)
            out.streams |= fed.streams
            out.aux |= fed.aux
            out.taps |= fed.taps
        return out

    def _add(self, hidden: Tensor, update: Tensor, seq: Seq, purpose: str, norm: nn.Module) -> Tensor:
        if self.training and self.residual_dropout > 0.0:
            key = seq.key(f"residual.{purpose}", self.layer)
            update = dropout(update, self.residual_dropout, key=key, positions=self.tp.own(seq.all_columns))
        hidden = hidden + update
        return hidden if self.pre else norm(hidden)


class Model(nn.Module):
    """A frontend and a stack. ``forward`` serves training, prefill and scoring; ``step`` goes on token by token."""

    def __init__(self, frontend: Frontend, stack: Stack) -> None:
        super().__init__()
        self.frontend, self.stack = frontend, stack

    @property
    def max_positions(self) -> int | None:
        """How many positions the model has, by its embedding and by what acts inside attention; None for any."""
        inside = (module.max_positions for module in self.modules() if isinstance(module, AttentionPositions))
        return min((n for n in (self.frontend.max_positions, *inside) if n is not None), default=None)

    def forward(self, inputs: Mapping[str, Tensor], seq: Seq, state: State = None) -> Out:
        """Hidden states of a batch; ``state`` continues the rows that returned it."""
        entered = self.frontend.embed(inputs, seq)
        out = self.stack(entered.hidden, seq.with_streams(entered.streams), state)
        out.aux = entered.aux | out.aux
        return out

    def step(self, inputs: Mapping[str, Tensor], seq: Seq, state: State) -> Out:
        """One more token of each row, inputs (B, 1), by the recurrent forms."""
        entered = self.frontend.embed(inputs, seq)
        return self.stack(entered.hidden, seq.with_streams(entered.streams), state, step=True)

    def part(self, layers: Sequence[str], *, first: bool, last: bool) -> ModelPart:
        """The model's part with these layers, sharing its modules: one stage of a pipeline."""
        # Only the ends embed and score; a module in two parts of one rank could not be sharded with both.
        frontend = self.frontend if first or last else nn.Identity()
        return ModelPart(frontend, self.stack.part(layers, first=first, last=last), first)

    @property
    def causal(self) -> bool:
        """Whether every region is causal, so that text can be generated left to right."""
        return all(region.traits.causal for region in self.regions())

    @property
    def carries(self) -> bool:
        """Whether some region hands a state to the next segment."""
        return any(region.traits.carries for region in self.regions())

    def regions(self) -> list[Region]:
        """Every mixer and channel mixer, in order."""
        return [m for m in self.modules() if isinstance(m, Region) and not isinstance(m, Frontend)]

    def flops_per_token(self, length: int) -> float:
        """Forward floating-point operations per token at row length ``length``, a multiply-add counted as two.

        Linear layers cost 2 per weight, each region adds what its mixing costs, the frontend its vocabulary scores.
        Look-ups, norms and activations are left out, as is usual. Training costs three times this.
        """
        linears = sum(2.0 * m.weight.numel() for m in self.modules() if isinstance(m, Linear))
        return linears + sum(r.mixing_flops(length) for r in self.modules() if isinstance(r, Region))


class ModelPart(Model):
    """A model between two cuts. All but the first begin with what the part before them sent (`received`)."""

    def __init__(self, frontend: Frontend | nn.Identity, stack: Stack, first: bool) -> None:
        super().__init__(frontend, stack)  # pyright: ignore[reportArgumentType]
        self.first = first
        self.received: Out | None = None

    def forward(self, inputs: Mapping[str, Tensor], seq: Seq, state: State = None) -> Out:
        if self.first:
            return super().forward(inputs, seq, state)
        assert self.received is not None, "a later part needs what the part before it sent"
        return self.stack(self.received.hidden, seq.with_streams(self.received.streams), state)
