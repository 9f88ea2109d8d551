"""Whether the components of a recipe fit each other, asked of the components themselves.

No system is named here: a component speaks through an optional ``check`` and through its constructor.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from potamos.pretrain.component import Location, problem
from potamos.pretrain.models import registry
from potamos.pretrain.models.build import build
from potamos.pretrain.models.interfaces import AttentionPositions, Options, Positions


def check_components(model: Any, sequence_length: int) -> list[ValidationError]:
    """What the components themselves refuse, given the width and the row length.

    Two ways for a system to speak, both optional: a classmethod ``check(options, width, sequence_length)`` that raises
    ValueError, and its constructor, tried on the meta device once for each kind of layer (a position scheme learns only
    there how many channels a head has).
    """
    problems = []
    for place, room, options in model.components():
        problems += check_component(room, options, ("model", *place), model.width, sequence_length)
    return problems or _check_layers(model, sequence_length)


def check_component(
    room: str, options: Options, place: Location, width: int, sequence_length: int
) -> list[ValidationError]:
    """What the ``check`` of one component says, if it has one."""
    check = getattr(registry.lookup(room, options.kind), "check", None)
    try:
        if check is not None:
            check(options, width, sequence_length)
    except ValueError as error:
        setting = str(error).partition(" ")[0]
        if setting in type(options).model_fields:  # "heads 5 does not divide ...": point at heads
            return [problem(str(error), (*place, setting), getattr(options, setting), absolute=True)]
        return [problem(str(error), place, absolute=True)]
    return []


def _check_layers(model: Any, sequence_length: int) -> list[ValidationError]:
    problems, seen = [], []
    heard = False  # whether some layer asks for the model's own position scheme
    for index in [*(i for i in range(model.layers) if i not in model.at)][:1] + sorted(model.at):
        layer, own = model.layer(index), model.at.get(index, {})
        if any(layer == other and ("positions" in own) == stated for other, stated in seen):
            continue
        seen.append((layer, "positions" in own))
        place = ("model", "at", index) if index in model.at else ("model",)
        alone = model.model_copy(update={"layers": 1, "at": {0: own} if own else {}})
        try:
            with torch.device("meta"):
                built = build(alone, sequence_length=sequence_length)
        except ValueError as error:
            problems.append(problem(f"layer {index} cannot be built: {error}", place, absolute=True))
            continue
        asks = any(isinstance(module, AttentionPositions) for module in built.modules())
        heard = heard or (asks and "positions" not in own)
        if "positions" in own and not asks and layer.positions.kind != "none":
            problems.append(_unheard(layer.positions, (*place, "positions"), "this layer does not have"))
    if not problems and not heard and _speaks_to_layers(model.positions):
        problems.append(_unheard(model.positions, ("model", "positions"), "no layer has"))
    return problems


def _speaks_to_layers(options: Options) -> bool:
    """Whether a position scheme acts inside attention and nowhere else."""
    scheme = registry.lookup("positions", options.kind)
    return scheme.attention is not Positions.attention and scheme.embedding is Positions.embedding


def _unheard(options: Options, place: Location, who: str) -> ValidationError:
    acts = "inside attention" if _speaks_to_layers(options) else "on the model's input (set model.positions)"
    message = f"would do nothing: {options.kind} acts {acts}, which {who}; take it out, or move it"
    return problem(message, (*place, "kind"), options.kind, absolute=True)
