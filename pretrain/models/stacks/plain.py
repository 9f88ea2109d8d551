"""The plain stack: blocks one after another, and a final norm where the blocks normalize first."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Context, Mixer, Out, Seq, Stack, State
from potamos.pretrain.models.linear import Norm, NormOptions
from potamos.pretrain.models.registry import register


@register("stack", "plain")
class Plain(Stack):
    """hidden -> block 0 -> ... -> block n-1 -> norm. The state is {layer: the mixer's state}."""

    class Options(interfaces.Options):
        kind: str = "plain"

    def __init__(self, options: Options, context: Context, blocks: nn.ModuleDict, norm: NormOptions) -> None:
        super().__init__()
        del options
        self.blocks = blocks
        self.norm = Norm(context.width, norm) if norm.place == "pre" else nn.Identity()

    def forward(self, hidden: Tensor, seq: Seq, state: State = None, *, step: bool = False) -> Out:
        total = Out(hidden, streams={name: seq.streams[name] for name in self.streams})
        carried = {}
        for layer, block in self.blocks.items():
            out = block(total.hidden, seq, None if state is None else state.get(layer), step=step)
            seq = seq.with_streams(out.streams)
            total.hidden = out.hidden
            total.streams |= out.streams
            total.taps |= out.taps
            for name, (value, count) in out.aux.items():
                previous = total.aux.get(name)
                total.aux[name] = (value if previous is None else previous[0] + value, count)
            if out.state is not None:
                carried[layer] = out.state
        total.hidden = self.norm(total.hidden)
        total.state = carried or None
        return total

    def part(self, layers: Sequence[str], *, first: bool, last: bool) -> Plain:
        del first
        made = copy.copy(self)
        made._modules = {**self._modules, "blocks": nn.ModuleDict({name: self.blocks[name] for name in layers})}
        if not last:
            made._modules["norm"] = nn.Identity()
        return made

    def segment_state(self, state: State) -> State:
        kept = {}
        for layer, value in (state or {}).items():
            mixer = self.blocks[layer].mixer
            assert isinstance(mixer, Mixer)
            kept[layer] = mixer.segment_state(value)
        return {layer: value for layer, value in kept.items() if value is not None} or None
