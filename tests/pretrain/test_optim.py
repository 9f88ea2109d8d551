"""Optimizers against torch's and against loops in plain tensors; schedules and norms against their formulas."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potamos.parallel.facts import parameter_table
from potamos.parallel.gradients import Gradients
from potamos.pretrain.models.build import materialize
from potamos.pretrain.models.linear import Linear
from potamos.pretrain.optim import QUINTIC, GradientNorm, Muon, Optimizer, orthogonalize, schedule_factor
from potamos.pretrain.recipe import AdamW, Constant, Decaying, ModelSection
from potamos.pretrain.recipe import Muon as MuonOptions

ADAMW = AdamW.model_validate({"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1})
MUON = MuonOptions.model_validate({"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "matrix_lr": 0.02})


@pytest.fixture
def model() -> nn.Module:
    """Two H3 layers about an attention layer, with an own scoring table: every kind of parameter there is."""
    section = ModelSection.model_validate(
        {
            "width": 16,
            "layers": 3,
            "frontend": {"kind": "tokens", "vocabulary": 31, "tied": False},
            "mixer": {"kind": "h3", "state": 4, "shift_state": 3},
            "channel": {"kind": "mlp", "ratio": 2},
            "positions": {"kind": "learned", "max_length": 8},
            "at": {1: {"mixer": {"kind": "attention", "heads": 4}}},
        }
    )
    return materialize(section, seed=0)


def optimizer_of(model: nn.Module, options: Any) -> Optimizer:
    return Optimizer(dict(model.named_parameters()), parameter_table(model), options)


def give_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


NO = torch.zeros(())
YES = torch.ones(())


# --- groups ------------------------------------------------------------------------------------------------------


def groups(model: nn.Module, options: Any) -> dict[str, tuple[str, float, float]]:
    """{parameter: (optimizer, learning rate, decay)}."""
    optimizer = optimizer_of(model, options)
    found = {}
    for inner in optimizer.optimizers:
        for group in inner.param_groups:
            for parameter in group["params"]:
                name = optimizer.names[parameter]
                assert name not in found
                found[name] = (type(inner).__name__, group["base_lr"], group["weight_decay"])
    return found


def test_groups_come_from_facts(model: nn.Module) -> None:
    found = groups(model, ADAMW)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (kind, rate, decay) in found.items():
        assert kind == "AdamW"
        leaf = name.rpartition(".")[2]
        dynamics = leaf in ("shift_b", "log_dt", "log_a", "b", "B")
        kept = dynamics or leaf == "bias" or "norm" in name or name.startswith("frontend.")
        assert rate == (1e-3 if dynamics else 3e-3), name
        assert decay == (0.0 if kept else 0.1), name
    assert sum(rate == 1e-3 for _, rate, _ in found.values()) == 2 * 5
    assert {n for n, (_, _, decay) in found.items() if decay} > {"stack.blocks.0.mixer.core.diagonal.C"}


def test_a_cap_only_lowers(model: nn.Module) -> None:
    found = groups(model, ADAMW.model_copy(update={"lr": 2e-4}))
    assert {rate for _, rate, _ in found.values()} == {2e-4}


def test_muon_takes_hidden_matrices_only(model: nn.Module) -> None:
    found = groups(model, MUON)
    matrices = {name for name, (kind, *_) in found.items() if kind == "Muon"}
    assert matrices == {
        f"stack.blocks.{layer}.{name}.weight"
        for layer in range(3)
        for name in ("mixer.q", "mixer.k", "mixer.v", "mixer.out", "channel.up", "channel.down")
    }
    assert {found[name][1:] for name in matrices} == {(0.02, 0.1)}
    default = groups(model, MUON.model_copy(update={"matrix_lr": None}))
    assert {default[name][1] for name in matrices} == {3e-3}


def test_frozen_parameters_are_left_out(model: nn.Module) -> None:
    frozen = model.get_parameter("frontend.tokens.weight").requires_grad_(False)
    before = frozen.clone()
    optimizer = optimizer_of(model, ADAMW)
    give_gradients(model, 1)
    optimizer.step(1.0, NO)
    assert "frontend.tokens.weight" not in groups(model, ADAMW)
    assert torch.equal(frozen, before)


# --- update rules ------------------------------------------------------------------------------------------------


def test_adamw_is_torchs(model: nn.Module) -> None:
    """Five steps of changing rates, against one torch.optim.AdamW with the groups written out by hand."""
    names = dict(model.named_parameters())
    twin = {n: nn.Parameter(p.detach().clone()) for n, p in names.items()}
    assigned = groups(model, ADAMW)
    reference = torch.optim.AdamW(
        [{"params": [p], "lr": assigned[n][1], "weight_decay": assigned[n][2]} for n, p in twin.items()],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    optimizer = optimizer_of(model, ADAMW)
    for step in range(5):
        give_gradients(model, step)
        for name, parameter in twin.items():
            parameter.grad = names[name].grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
        factor = (step + 1) / 5
        for group in reference.param_groups:
            group["lr"] = assigned[next(n for n, p in twin.items() if p is group["params"][0])][1] * factor
        reference.step()
        optimizer.step(factor, NO)
        optimizer.zero_grad()
        assert all(p.grad is None for p in names.values())
    for name, parameter in twin.items():
        torch.testing.assert_close(names[name].detach(), parameter.detach(), rtol=2e-6, atol=2e-7, msg=name)


def naive_orthogonalize(matrix: Tensor) -> Tensor:
    """Newton-Schulz on one matrix, the powers of the Gram matrix written out."""
    a, b, c = QUINTIC
    x = matrix / matrix.norm()
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 24), (24, 10), (10, 24)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    matrices = u @ torch.diag_embed(torch.linspace(0.05, 1.0, u.shape[2]).expand(3, -1)) @ vt
    for number, result in enumerate(orthogonalize(matrices)):
        torch.testing.assert_close(result, naive_orthogonalize(matrices[number]), rtol=0, atol=2e-5)
        # The same singular vectors, and values between 0.6 and 1.2: the quintic does not converge to one.
        inside = u[number].T @ result @ vt[number].T
        assert inside.diagonal().min() > 0.6
        assert inside.diagonal().max() < 1.2
        assert (inside - inside.diagonal().diag()).abs().max() < 1e-3


def test_muon_is_a_plain_loop() -> None:
    """Nesterov momentum, decay before the update, the update at AdamW's size: written out for each matrix by itself."""
    parameters = [nn.Parameter(torch.randn(s)) for s in [(12, 8), (12, 8), (8, 8), (8, 20)]]
    values, buffers = [p.detach().clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    muon = Muon([{"params": parameters, "weight_decay": 0.1}], lr=0.02, momentum=0.9)
    for step in range(4):
        torch.manual_seed(step)
        for i, parameter in enumerate(parameters):
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            buffers[i] = 0.9 * buffers[i] + 0.1 * gradient
            update = naive_orthogonalize(0.1 * gradient + 0.9 * buffers[i])
            rows, columns = gradient.shape
            values[i] = values[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(max(rows, columns)) * update
        muon.step()
    for parameter, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (24, 10), (10, 24)])
def test_doubles_are_orthogonalized_as_doubles(shape: tuple[int, int]) -> None:
    """What is compared to 1e-10 elsewhere: iterated in fp32, small singular values are wrong by 1e-5."""
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonalize(matrices)
    assert found.dtype == torch.float64
    for result, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(result, naive_orthogonalize(matrix), rtol=0, atol=1e-11)


def test_muon_is_torchs() -> None:
    """torch.optim.Muon iterates in bf16, so only to that: 1 % of the update."""
    ours, theirs = (nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    start = ours.detach().clone()
    muon = Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.02, momentum=0.95)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        reference.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.01 * moved
    assert moved > 0.1


def test_muon_update_has_adamws_size() -> None:
    """Root mean square 0.2 of the learning rate, whatever the gradient's scale or shape (Liu et al. 2025)."""
    for shape in [(64, 64), (64, 256), (256, 64)]:
        parameter = nn.Parameter(torch.zeros(shape))
        muon = Muon([{"params": [parameter]}], lr=1.0, momentum=0.95)
        parameter.grad = 1e-3 * torch.randn(shape)
        muon.step()
        assert 0.13 < parameter.detach().square().mean().sqrt().item() < 0.24


# --- refusing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_a_refused_step_changes_no_bit(model: nn.Module, options: Any, bad: float, warm: bool) -> None:
    optimizer = optimizer_of(model, options)
    if warm:
        for step in range(2):
            give_gradients(model, step)
            optimizer.step(1.0, NO)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = {n: t.clone() for n, t in optimizer.state_tensors().items()}
    give_gradients(model, 7)
    for parameter in model.parameters():
        parameter.grad.view(-1)[0] = bad  # pyright: ignore[reportOptionalMemberAccess]
    optimizer.step(1.0, YES)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    for name, moment in optimizer.state_tensors().items():
        assert torch.equal(moment, moments.get(name, torch.zeros_like(moment))), name
    # And the next accepted step is that of a run which never met the bad one.
    give_gradients(model, 8)
    optimizer.step(1.0, NO)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(next(iter(parameters.values())), next(model.parameters()))


@pytest.mark.parametrize("options", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_refused_step_leaves_no_trace(options: Any) -> None:
    """Good, bad (refused), good = good, good."""
    results = []
    for with_bad in (False, True):
        torch.manual_seed(0)
        layer = nn.Sequential(_linear(), _linear())
        optimizer = optimizer_of(layer, options)
        for seed, refused in ((1, NO), *([(2, YES)] if with_bad else []), (3, NO)):
            give_gradients(layer, seed, float("nan") if refused is YES else 1.0)
            optimizer.step(0.7, refused)
        results.append([p.detach() for p in layer.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _linear() -> nn.Module:
    layer = Linear(6, 6)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


# --- state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ADAMW, MUON], ids=["adamw", "muon"])
def test_state_goes_round(model: nn.Module, options: Any) -> None:
    """Stored after two steps and loaded into a fresh optimizer, the third step is the same to the bit."""
    first = optimizer_of(model, options)
    assert first.state_tensors() == {}
    for step in range(2):
        give_gradients(model, step)
        first.step(1.0, NO)
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in first.state_tensors().items()}
    assert all(name.rpartition(".")[0] in saved for name in state)
    assert {name.rpartition(".")[0] for name in state} == set(saved)

    give_gradients(model, 2)
    first.step(0.5, NO)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
    second = optimizer_of(model, options)
    second.load_tensors(state)
    for name, tensor in second.state_tensors().items():
        assert tensor.data_ptr() != state[name].data_ptr(), "the loaded tensor is the stored one"
    give_gradients(model, 2)
    second.step(0.5, NO)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, after[name]), name


def test_state_of_an_unknown_parameter_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'stack\.nothing\.weight\.exp_avg'"):
        optimizer_of(model, ADAMW).load_tensors({"stack.nothing.weight.exp_avg": torch.zeros(1)})


# --- schedules ---------------------------------------------------------------------------------------------------


def factors(options: Any, steps: int) -> list[float]:
    return [schedule_factor(options, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedules_warm_up_fall_and_stay(kind: str) -> None:
    found = factors(Decaying(kind=kind, warmup=10, decay=50, floor=0.2), 70)  # pyright: ignore[reportArgumentType]
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10] == 1.0
    assert found[50:] == pytest.approx([0.2] * 20)
    assert found[30] == pytest.approx(0.6)  # half of the way from 1 to the floor, for both
    quarter = 0.5 * (1 + math.cos(math.pi / 4)) if kind == "cosine" else 0.75
    assert found[20] == pytest.approx(0.2 + 0.8 * quarter)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))
    assert found[49] > 0.2


def test_wsd_is_level_and_then_falls_to_the_end() -> None:
    found = factors(Decaying(kind="wsd", warmup=5, decay=20, floor=0.0), 60)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:41] == [1.0] * 36
    assert found[40:] == pytest.approx([1 - i / 20 for i in range(20)])
    assert schedule_factor(Decaying(kind="wsd", warmup=5, decay=20, floor=0.0), 60, 60) == 0.0


def test_constant_and_no_warmup() -> None:
    assert factors(Constant(warmup=3), 6) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0])
    assert factors(Constant(warmup=0), 3) == [1.0, 1.0, 1.0]
    assert factors(Decaying(kind="cosine", warmup=0, decay=4, floor=0.0), 6)[::4] == [1.0, 0.0]
    # A schedule that is only a warm-up still has a value at every step.
    assert factors(Decaying(kind="linear", warmup=3, decay=3, floor=0.5), 5) == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.5, 0.5]
    )


# --- norms -------------------------------------------------------------------------------------------------------


def test_norms_in_all_and_by_kind(model: nn.Module) -> None:
    parameters, table = dict(model.named_parameters()), parameter_table(model)
    norm = GradientNorm(Gradients(parameters), table)
    give_gradients(model, 1)
    parameters["stack.blocks.0.mixer.q.bias"].grad = None
    total, kinds = norm.measure()
    assert norm.kinds == sorted({"mixer", "channel", "frontend", "stack"})
    present = {n: p.grad.double() for n, p in parameters.items() if p.grad is not None}
    assert total.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in present.values())), rel=1e-6)
    for kind, value in zip(norm.kinds, kinds.tolist(), strict=True):
        squares = [g.square().sum().item() for n, g in present.items() if table[n].kind == kind]
        assert value == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
    assert sum(k**2 for k in kinds.tolist()) == pytest.approx(total.item() ** 2, rel=1e-6)


@pytest.mark.parametrize("limit", [0.5, 1e6, None])
def test_clipping_is_torchs(model: nn.Module, limit: float | None) -> None:
    norm = GradientNorm(Gradients(dict(model.named_parameters())), parameter_table(model))
    give_gradients(model, 1)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm.clip(norm.measure()[0], limit)
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    twin = [SimpleNamespace(grad=g) for g in before]
    holders = [nn.Parameter(torch.empty_like(t.grad)) for t in twin]
    for holder, gradient in zip(holders, before, strict=True):
        holder.grad = gradient.clone()
    if limit is not None:
        nn.utils.clip_grad_norm_(holders, limit)
    for got, holder in zip(found, holders, strict=True):
        assert holder.grad is not None
        torch.testing.assert_close(got, holder.grad, rtol=1e-6, atol=0)
    after = math.sqrt(sum(g.double().square().sum().item() for g in found))
    assert (
        after == pytest.approx(limit, rel=1e-4)
        if limit == 0.5
        else all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    )


def test_a_norm_that_is_not_finite_is_said(model: nn.Module) -> None:
    norm = GradientNorm(Gradients(dict(model.named_parameters())), parameter_table(model))
    give_gradients(model, 1)
    model.get_parameter("stack.norm.bias").grad[3] = float("nan")  # pyright: ignore[reportOptionalSubscript]
    total, kinds = norm.measure()
    assert total.isnan()
    assert [kind for kind, value in zip(norm.kinds, kinds, strict=True) if value.isnan()] == ["stack"]
