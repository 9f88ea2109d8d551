"""Initial values follow the laws that they claim."""

from __future__ import annotations

import math

import pytest
import torch

from potamos.pretrain.config import load_recipe
from potamos.pretrain.models.build import materialize

LAYERS = 8


@pytest.fixture(scope="module")
def parameters() -> dict[str, torch.Tensor]:
    recipe = load_recipe(
        "h3_hybrid_tiny",
        [f"model.layers={LAYERS}", "model.width=128", "model.mixer={kind: h3, state: 64, shift_state: 64}",
         "model.at={1: {mixer: {kind: attention, heads: 4}}, 2: {mixer: {kind: s4d}}}"],
    )  # fmt: skip
    return {name: p.detach() for name, p in materialize(recipe.model, seed=3).named_parameters()}


def check_normal(values: torch.Tensor, std: float) -> None:
    """Mean and standard deviation within 5 standard errors of N(0, std)."""
    n = values.numel()
    assert abs(values.mean().item()) < 5 * std / math.sqrt(n)
    assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * n)


def test_gpt2_weights(parameters: dict[str, torch.Tensor]) -> None:
    residual = 0.02 / math.sqrt(2 * LAYERS)
    blocks = "stack.blocks"
    for name in (f"{blocks}.1.mixer.q.weight", f"{blocks}.0.channel.up.weight", "frontend.tokens.weight"):
        check_normal(parameters[name], 0.02)
    for name in (f"{blocks}.1.mixer.out.weight", f"{blocks}.0.channel.down.weight"):
        check_normal(parameters[name], residual)
    # The rescaling rule of the released training code does not match H3's output projection, which stays at 0.02.
    check_normal(parameters[f"{blocks}.0.mixer.out.weight"], 0.02)
    for name, parameter in parameters.items():
        if "norm" in name or name.endswith(".bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float("norm" in name and "weight" in name))), name


def test_h3_starts_as_a_convolution(parameters: dict[str, torch.Tensor]) -> None:
    core = {n.removeprefix("stack.blocks.0.mixer.core."): p for n, p in parameters.items() if ".0.mixer.core." in n}
    first = torch.zeros(128, 64)
    first[:, 0] = 1.0
    assert torch.equal(core["shift_b"], first)
    bound = 1 / math.sqrt(64)
    assert core["shift_c"].abs().max() <= bound
    assert abs(core["shift_c"].std().item() / (bound / math.sqrt(3)) - 1) < 0.05
    check_normal(core["d_k"], 1.0)
    check_normal(core["d"], 1.0)
    assert torch.allclose(core["diagonal.log_a"].exp(), torch.tensor(0.5))
    assert torch.allclose(core["diagonal.b"], math.pi * torch.arange(32.0).expand(128, 32))
    assert torch.equal(core["diagonal.B"], torch.tensor([1.0, 0.0]).expand(128, 32, 2))
    check_normal(core["diagonal.C"], math.sqrt(0.5))
    log_dt = core["diagonal.log_dt"]
    assert log_dt.min() >= math.log(1e-3)
    assert log_dt.max() <= math.log(1e-1)
    assert abs(log_dt.mean().item() - math.log(1e-2)) < 5 * math.log(100) / math.sqrt(12 * 128)
