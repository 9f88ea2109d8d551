"""Optimizers whose groups come from declared facts, and the schedules.

Both update rules take a step's verdict as a tensor: a refused step leaves parameters and moments bitwise as they were,
decided on the device, without a word to the host.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from potamos.parallel.facts import ParameterFacts
from potamos.parallel.gradients import Gradients

# Newton-Schulz quintic that drives every singular value into about [0.7, 1.2] (Jordan et al. 2024, "Muon").
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly U V^T of each matrix U S V^T of a stack (n, rows, columns), by Newton-Schulz iteration.

    bf16 on a GPU, where it is free; fp32 on a CPU, where half precision may be emulated. fp64 stays as it is: then
    someone compares, and the iteration makes small differences of small singular values several hundred times larger.
    """
    a, b, c = QUINTIC
    x = (
        matrices
        if matrices.dtype == torch.float64
        else matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    )
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized per matrix (Jordan et al. 2024), for hidden weight matrices.

    Updates are scaled by 0.2 sqrt(max(rows, columns)), which gives them AdamW's usual root mean square (Liu et al.
    2025, "Muon is scalable for LLM training"), so that learning rates and decay carry over. Matrices of one shape are
    iterated as one stack.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, cuts: Cuts | None = None) -> None:
        """cuts: how to make a cut matrix whole and to cut it again, where a layout has cut some."""
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self.cuts = cuts
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix, unless ``found_inf`` is one."""
        del closure
        for group in self.param_groups:
            alike: dict[Hashable, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape if self.cuts is None else self.cuts.kind(parameter)].append(parameter)
            for parameters in alike.values():
                self._step_shape(parameters, group)

    def _step_shape(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        accept = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        gradients = [p.grad for p in parameters if p.grad is not None]
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in parameters]
        gradient, previous = torch.stack(gradients), torch.stack(buffers)
        if self.found_inf is not None:
            # A refused gradient may hold NaN, and 0 * NaN is NaN: replace it, do not scale it. By the momentum, because
            # lerp(a, a, w) is a to the bit.
            gradient = torch.where(self.found_inf > 0, previous, gradient)
        momentum = torch.lerp(gradient, previous, group["momentum"])
        update, sides = self._orthogonalize(parameters, torch.lerp(gradient, momentum, group["momentum"]))
        rate = group["lr"] * accept
        scale = 0.2 * math.sqrt(max(sides))
        for parameter, buffer, new, direction in zip(parameters, buffers, momentum, update, strict=True):
            buffer.copy_(new)
            parameter.mul_(1.0 - rate * group["weight_decay"])
            parameter.sub_(direction * (rate * scale))

    def _orthogonalize(self, parameters: list[Tensor], moments: Tensor) -> tuple[Tensor, Sequence[int]]:
        """The updates of a stack of matrices, and the sides of each whole one: a slice has other singular values."""
        if self.cuts is None:
            return orthogonalize(moments), parameters[0].shape
        whole = [self.cuts.whole(p, moment) for p, moment in zip(parameters, moments, strict=True)]
        directions = orthogonalize(torch.stack(whole))
        own = [self.cuts.local(p, direction) for p, direction in zip(parameters, directions, strict=True)]
        return torch.stack(own), whole[0].shape


class Cuts(Protocol):
    """How parameters are cut over ranks; every rank asks in the same order."""

    def kind(self, stored: Tensor, /) -> Hashable:
        """Equal for parameters of one whole shape that are cut alike."""
        ...

    def whole(self, stored: Tensor, value: Tensor, /) -> Tensor: ...
    def local(self, stored: Tensor, whole: Tensor, /) -> Tensor: ...


class Optimizer:
    """AdamW for everything, or AdamW and Muon for hidden matrices, grouped by facts.

    Groups differ in decay and in the cap on the learning rate. State is exposed as tensors under parameters' names, so
    that a checkpoint does not depend on how groups were formed.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        table: Mapping[str, ParameterFacts],
        options: Any,
        cuts: Cuts | None = None,
    ) -> None:
        self.options = options
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.names = {p: name for name, p in self.parameters.items()}
        matrices = {n for n in self.parameters if options.kind == "muon" and table[n].matrix}
        adam_groups = self._groups(set(self.parameters) - matrices, table, options.lr)
        self.optimizers: list[torch.optim.Optimizer] = []
        if adam_groups:
            self.optimizers.append(
                torch.optim.AdamW(adam_groups, lr=options.lr, betas=options.betas, eps=options.epsilon, fused=True)
            )
        if matrices:
            groups = self._groups(matrices, table, options.matrix_lr or options.lr)
            self.optimizers.append(Muon(groups, lr=options.lr, momentum=options.momentum, cuts=cuts))

    def _groups(self, names: set[str], table: Mapping[str, ParameterFacts], lr: float) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
        for name, parameter in self.parameters.items():  # the model's order, so that every run forms the same groups
            if name in names:
                facts = table[name]
                rate = lr if facts.lr_cap is None else min(lr, facts.lr_cap)
                groups[rate, self.options.weight_decay if facts.decay else 0.0].append(parameter)
        return [
            {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items()
        ]

    def step(self, factor: float, refused: Tensor) -> None:
        """One update at ``factor`` times each group's learning rate; nothing at all where ``refused`` (0-dim) is 1."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.found_inf = refused  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """{parameter name + "." + moment: tensor}; empty before the first step."""
        return {
            f"{self.names[p]}.{key}": value
            for optimizer in self.optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state_tensors`` gave, asking for one tensor at a time; ValueError names tensors of unknown
        parameters."""
        owner = {p: optimizer for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]}
        for name, tensor in tensors.items():
            parameter = self.parameters.get(name.rpartition(".")[0])
            if parameter is None:
                raise ValueError(f"the checkpoint has optimizer state {name!r}, but the model has no such parameter")
            key = name.rpartition(".")[2]
            # Fused AdamW keeps its step count beside the parameter, in fp32; moments follow the parameter's dtype.
            dtype = torch.float32 if key == "step" else parameter.dtype
            owner[parameter].state[parameter][key] = tensor.to(parameter.device, dtype, copy=True)


def schedule_factor(options: Any, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (0-based) as a fraction of its peak.

    Warm-up is linear and reaches 1 at its last step. ``cosine`` and ``linear`` come down to ``floor`` at step ``decay``
    and stay; ``wsd`` (warm-up, stable, decay; Hu et al. 2024) stays at 1 until ``steps - decay``; ``constant`` stays.
    """
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.kind == "constant":
        return 1.0
    if options.kind == "wsd":
        start, end = steps - options.decay, steps
    else:
        start, end = options.warmup, options.decay
    progress = 1.0 if step >= end else max(0.0, (step - start) / (end - start))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if options.kind == "cosine" else 1.0 - progress
    return options.floor + (1.0 - options.floor) * shape


class GradientNorm:
    """The gradient's norm, in all and per kind of module, on the device; and clipping by it."""

    def __init__(self, gradients: Gradients, table: Mapping[str, ParameterFacts]) -> None:
        """table: facts of every parameter of the whole model, of which this rank may hold some."""
        self.gradients = gradients
        self.kinds = sorted({facts.kind for facts in table.values()})
        self.by_name = {name: self.kinds.index(table[name].kind) for name in gradients.parameters}

    def measure(self) -> tuple[Tensor, Tensor]:
        """(total (), per kind (len(kinds))) 2-norms; a parameter without a gradient counts as zero."""
        squares = self.gradients.squares(self.by_name, len(self.kinds))
        return squares.sum().sqrt(), squares.sqrt()

    def clip(self, total: Tensor, limit: float | None) -> None:
        """Scale gradients by min(1, limit / total); no limit leaves them."""
        if limit is not None:
            self.gradients.clip(total, limit)
