"""Everything registered keeps the contract; nothing here names a system."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from potamos.parallel.facts import Traits
from potamos.pretrain.models import registry
from potamos.pretrain.models.initialize import Gpt2, generator, initialize
from potamos.pretrain.models.mixers.attention import Attention

ROOMS = ("mixer", "channel", "positions", "pattern")


def test_contract(contract: ModuleType, case: Any, check: Any) -> None:
    subject = contract.make(case)
    if check.__name__ in contract.CAUSAL_ONLY and not subject.region.traits.causal:
        return  # a mixer that looks ahead has no recurrent form; everything else holds for it too
    check(subject)


class Bidirectional(Attention):
    """The host of positions and patterns, seeing later keys too."""

    traits = Traits(shard="head", causal=False)


@pytest.mark.parametrize("name", ["isolation", "packing", "gradients", "state"])
def test_contract_without_causality(
    contract: ModuleType, monkeypatch: pytest.MonkeyPatch, case: Any, name: str
) -> None:
    """What positions and patterns do where attention looks both ways."""
    if case.room not in ("positions", "pattern"):
        return
    registry.names("mixer")
    monkeypatch.setitem(registry._table["mixer"], "attention", Bidirectional)
    subject = contract.make(case)
    assert not subject.region.traits.causal
    getattr(contract, f"check_{name}")(subject)


def test_every_registered_name_is_held_to_it(contract: ModuleType) -> None:
    cases = {(case.room, case.name) for case in contract.subjects(*ROOMS)}
    assert cases == {(room, name) for room in ROOMS for name in registry.names(room)}
    assert {"attention", "h3", "s4d"} <= {name for room, name in cases if room == "mixer"}
    assert {
        *("none", "learned", "sinusoidal", "rope", "alibi"),
        *("xpos", "sandwich", "t5", "rpe", "disentangled"),
    } <= {name for room, name in cases if room == "positions"}
    assert {"full", "local", "bigbird", "butterfly", "blockwise"} <= {name for room, name in cases if room == "pattern"}


def test_every_parameter_is_drawn(contract: ModuleType, case: Any) -> None:
    """`draw` overwrites every element, and says nothing that depends on what was there."""
    region, embedding = contract.region_of(case)
    law = Gpt2(Gpt2.Options(std=0.3), layers=2)
    for module in contract.Subject(region, embedding).modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = []
            for poison in (float("nan"), 17.0):
                value = torch.full(parameter.shape, poison)
                law.fill(module, name, value, generator(3, name))
                values.append(value)
            assert values[0].isfinite().all(), f"{name} of {type(module).__name__} is not drawn"
            assert torch.equal(*values)


def test_initial_values_depend_on_seed_and_name_only(contract: ModuleType, case: Any) -> None:
    """Not on what else the process holds, nor on whether the model was built without memory."""

    def build(*layers: int, meta: bool, seed: int = 9) -> dict[str, torch.Tensor]:
        with torch.device("meta" if meta else "cpu"):
            model = nn.ModuleDict({str(i): contract.Subject(*contract.region_of(case, layer=i)) for i in layers})
        initialize(model, Gpt2(Gpt2.Options(std=0.02), layers=2), seed)
        return dict(model.named_parameters())

    alone = build(1, meta=True)
    for other in (build(0, 1, meta=True), build(1, meta=False)):
        for name, value in alone.items():
            assert torch.equal(value, other[name]), name
    reseeded = build(1, meta=True, seed=10)
    random = [name for name, value in alone.items() if value.std(correction=0) > 0 and name.endswith("weight")]
    assert all(not torch.equal(alone[name], reseeded[name]) for name in random)
