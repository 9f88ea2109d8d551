"""The trainer against the plainest loop that does the same: torch's own loss, AdamW and clipping, and a rate by hand.

Nothing of the trainer's is used but the model: rows are read one batch at a time, targets are found token by token, the
gradient is of one batch where the trainer accumulates two.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from potamos.pretrain import setup
from potamos.pretrain.models.interfaces import Seq

STEPS, ROWS, RATE, WARMUP, DECAY, FLOOR, CLIP, WEIGHT_DECAY = 6, 8, 1e-2, 2, 5, 0.1, 0.7, 0.1
CHANGES = (
    f"optimizer={{kind: adamw, lr: {RATE}, betas: [0.9, 0.95], weight_decay: {WEIGHT_DECAY}, clip: {CLIP}}}",
    f"schedule={{kind: cosine, warmup: {WARMUP}, decay: {DECAY}, floor: {FLOOR}}}",
    f"train={{steps: {STEPS}, sequences: {ROWS}, micro_sequences: 4, seed: 5, device: cpu}}",
)


def learning_rate(step: int) -> float:
    """Linear to the peak in WARMUP steps, then half a cosine down to the floor at step DECAY."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    progress = min(1.0, (step - WARMUP) / (DECAY - WARMUP))
    return RATE * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


def naive_losses(recipe, clip: float | None = CLIP, shift: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final parameters; ``shift`` moves the schedule, for a planted mistake."""
    tokenizer = setup.open_tokenizer(recipe)
    stream = setup.open_stream(recipe, tokenizer)
    model = setup.build_system(recipe, torch.device("cpu")).model.train()
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        dynamics = last in ("shift_b", "log_dt", "log_a", "b", "B")
        plain = "norm" in name or last == "bias" or name.startswith("frontend.tokens")
        groups.setdefault((dynamics, not plain and not dynamics), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": p, "capped": capped, "weight_decay": WEIGHT_DECAY if decay else 0.0}
            for (capped, decay), p in groups.items()
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses = []
    for step in range(STEPS):
        rows = stream.read(step * ROWS, ROWS)
        tokens, documents = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.document_ids)
        seq = Seq(
            positions=torch.from_numpy(rows.positions[:, :-1]).long(),
            document_ids=documents[:, :-1].contiguous(),
            samples=torch.from_numpy(rows.samples),
            seed=recipe.train.seed,
            step=step,
        )
        logits = model.frontend.logits(model({"tokens": tokens[:, :-1]}, seq).hidden)
        nats, count = torch.zeros(()), 0
        for row in range(ROWS):
            for column in range(tokens.shape[1] - 1):
                if documents[row, column] == documents[row, column + 1]:
                    nats = nats + F.cross_entropy(logits[row, column], tokens[row, column + 1])
                    count += 1
        loss = nats / count
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        rate = learning_rate(step + shift)
        for group in optimizer.param_groups:
            group["lr"] = rate / RATE * min(RATE, 1e-3) if group["capped"] else rate
        optimizer.step()
        losses.append(loss.item())
    return losses, {f"model.{name}": p.detach() for name, p in model.named_parameters()}


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def test_trainer_is_the_plain_loop(trial, tmp_path) -> None:
    assert trial.fit(tmp_path / "run", *CHANGES) == 0
    found = trial.losses(tmp_path / "run")
    recipe = trial.recipe(*CHANGES)
    losses, parameters = naive_losses(recipe)
    # fp32 sums in another order differ by about 1e-7; AdamW's first steps divide small gradients by themselves.
    assert worst(found, losses) < 1e-5
    assert worst(found, naive_losses(recipe, clip=None)[0]) > 1e-4  # what a clip that does nothing would give
    assert worst(found, naive_losses(recipe, shift=1)[0]) > 1e-4  # or a schedule one step ahead
    stored = trial.newest(tmp_path / "run").model
    assert stored.keys() == parameters.keys()
    start = dict(setup.build_system(recipe, torch.device("cpu")).named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(".k.bias") and ".blocks.1." in name:
            continue  # a key bias of softmax attention has no gradient but rounding, which AdamW makes large
        moved = (parameter - start[name]).norm()
        assert (stored[name] - parameter).norm() <= 1e-3 * moved, name


def test_dropout_draws_anew_in_every_step(trial, tmp_path) -> None:
    """The same rows give another loss in another step, and the same one in the same step."""
    changes = ("model.frontend.embedding_dropout=0.5", "optimizer.lr=1e-12", "optimizer.matrix_lr=1e-12")
    trainer = trial.trainer(tmp_path / "run", *changes)
    trainer.system.train()
    rows = trainer.stream.read(0, ROWS)

    def loss(step: int) -> float:
        trainer.step = step
        terms = [trainer.system(batch).terms["causal"].sum for batch in trainer.prepare(rows)]
        return torch.stack(terms).sum().item()

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
