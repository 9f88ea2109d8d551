"""From the ``model`` section of a recipe to a Model. The only place that walks from settings to modules."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from potamos.pretrain.models import registry
from potamos.pretrain.models.initialize import initialize
from potamos.pretrain.models.interfaces import Context, Initializer
from potamos.pretrain.models.linear import NormOptions
from potamos.pretrain.models.trunk import Block, Model


class ModelSettings(Protocol):
    """What is read of a recipe's ``model`` section."""

    width: int
    layers: int
    frontend: Any
    norm: NormOptions
    stack: Any
    positions: Any
    init: Any
    residual_dropout: float

    def layer(self, index: int) -> Any:
        """``mixer``, ``channel`` (or None), ``positions`` and ``pattern`` of one layer, overrides applied."""
        ...


def build(settings: ModelSettings, *, sequence_length: int = 0) -> Model:
    """An unfilled model on the current default device; use ``with torch.device("meta")`` and ``materialize``."""

    def make(room: str, options: Any, *arguments: Any) -> Any:
        return registry.lookup(room, options.kind)(options, *arguments)

    vocabulary = getattr(settings.frontend, "vocabulary", 0)

    def context(layer: int) -> Context:
        return Context(
            width=settings.width,
            layers=settings.layers,
            layer=layer,
            vocabulary=vocabulary,
            sequence_length=sequence_length,
            positions=make("positions", settings.layer(layer).positions),
            pattern=make("pattern", settings.layer(layer).pattern),
        )

    blocks = nn.ModuleDict()
    for layer in range(settings.layers):
        here = context(layer)
        options = settings.layer(layer)
        blocks[str(layer)] = Block(
            make("mixer", options.mixer, here),
            make("channel", options.channel, here) if options.channel is not None else None,
            width=settings.width,
            layer=layer,
            norm=settings.norm,
            residual_dropout=settings.residual_dropout,
        )
    whole = Context(
        width=settings.width,
        layers=settings.layers,
        vocabulary=vocabulary,
        sequence_length=sequence_length,
        positions=make("positions", settings.positions),
    )
    return Model(
        make("frontend", settings.frontend, whole), make("stack", settings.stack, whole, blocks, settings.norm)
    )


def initializer(settings: ModelSettings) -> Initializer:
    """The initializer that the recipe names."""
    return registry.lookup("init", settings.init.kind)(settings.init, settings.layers)


def materialize(
    settings: ModelSettings, seed: int, *, sequence_length: int = 0, device: torch.device | str = "cpu"
) -> Model:
    """A filled model: built without memory, then every parameter drawn from (seed, its name)."""
    with torch.device("meta"):
        model = build(settings, sequence_length=sequence_length)
    initialize(model, initializer(settings), seed, device)
    return model
