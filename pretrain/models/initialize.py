"""Initial values, the same for every layout: each parameter is drawn by itself, from (seed, its full name)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Initializer
from potamos.pretrain.models.registry import register


@register("init", "gpt2")
class Gpt2(Initializer):
    """N(0, std) for linear and embedding weights, std / sqrt(2 * layers) for projections into the residual stream, zero
    biases, unit norms (Radford et al. 2019); state-space parameters draw their own laws."""

    class Options(interfaces.Options):
        kind: str = "gpt2"
        std: float = Field(0.02, gt=0)

    def __init__(self, options: Options, layers: int) -> None:
        super().__init__(options)
        self.std, self.layers = options.std, layers

    def fill(self, module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        module.draw(name, parameter, generator, self.std, self.layers)  # pyright: ignore[reportCallIssue]


def initialize(
    model: nn.Module,
    initializer: Initializer,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    shapes: Mapping[str, torch.Size] | None = None,
    cut: Callable[[str, Tensor], Tensor] = lambda name, whole: whole,
) -> None:
    """Materialize a model built on the meta device and fill every parameter.

    Values are drawn on the CPU in fp32 by a generator keyed by (seed, name), so they depend neither on the device nor
    on which other parameters this process holds. A shared parameter is drawn once, under its first name.

    Where a layout has cut parameters: shapes gives each one's whole shape by name, and ``cut`` (name, whole value) what
    of it this process holds. The whole is drawn and cut, so that every layout begins with the same values.
    """
    _allocate(model, device)
    done: set[int] = set()
    with torch.no_grad():
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in done:
                    continue
                done.add(id(parameter))
                full = f"{path}.{name}"
                value = torch.empty(parameter.shape if shapes is None else shapes[full], dtype=torch.float32)
                initializer.fill(module, name, value, generator(seed, full))
                parameter.copy_(cut(full, value))


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator keyed by (seed, name)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def _allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give every meta parameter memory, shared ones once; move buffers, whose values are constants of the model."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
