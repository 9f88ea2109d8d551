"""Going on with a run: who may, from which checkpoint, whether it belongs to this run, and what of it a rank reads."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from potamos.data.loader import TokenStream
from potamos.parallel import launch
from potamos.parallel.apply import Spread
from potamos.pretrain.checkpoint import RECIPE, TRAINER, CheckpointError, Checkpoints, Loaded, Readers
from potamos.pretrain.config import Change, parse_recipe, resume_check
from potamos.pretrain.recipe import Recipe
from potamos.slurm.lock import mark_busy
from potamos.slurm.run_folder import RunFolder
from potamos.slurm.undo import accept

logger = logging.getLogger(__name__)

GUARD = "guard."
"""How the spike guard's tensors are named among the optimizer's."""


class RunBusyError(ValueError):
    """The folder is taken: by another process that trains in it, or by other files."""


def hold(folder: RunFolder) -> TextIO:
    """Claim a run folder for as long as the returned file is open; a process that dies lets go by itself.

    A record lock, so it holds across machines where the file system supports it. Two trainings in one folder would
    replace each other's checkpoints without a word. An attempt of a cluster's job that is refused leaves
    `busy.<attempt>` for its batch script, which waits rather than counting a crash (`slurm/lock.py`).

    Raises:
        RunBusyError: another process holds it; names its host and process.
    """
    if folder.path.is_dir() and any(folder.path.iterdir()) and not folder.begun:
        raise RunBusyError(f"{folder.path} holds other files and no run; name a new folder with --run")
    folder.path.mkdir(parents=True, exist_ok=True)
    file = open(folder.lock, "a+", encoding="utf-8")  # noqa: SIM115 (open until the run ends)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): do not train twice in one folder", folder.lock, error)
            return file
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        if (attempt := os.environ.get("POTAMOS_ATTEMPT", "")).isdecimal():
            with contextlib.suppress(OSError):  # a full disk: the refusal is what to tell
                mark_busy(folder, int(attempt), holder)
        raise RunBusyError(
            f"{folder.path} is in use by {holder}; wait for it to end, stop it, or name another folder with --run"
        ) from None
    accept(folder.path)  # a killed submission's changes must not be taken back under what is trained with them
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def newest(checkpoints: Checkpoints, rank: launch.Rank) -> Loaded | None:
    """The checkpoint to go on from: the same on every rank, and one that all of them can read.

    Raises:
        CheckpointError: there are some, and none of them is sound for all ranks.
    """
    readers = Readers(rank.rank, rank.world, launch.broadcast_object, launch.first_failure)
    return checkpoints.latest(readers)


def check_recipe(loaded: Loaded, recipe: Recipe, run: Path) -> list[Change]:
    """How the recipe differs from the one that `loaded` was trained with; refuses one that would not continue it.

    Raises:
        ValueError: a change that no run can take, fewer steps than are trained, or rows that would not go on.
    """
    before = parse_recipe(loaded.recipe, str(loaded.path / RECIPE))
    changes = resume_check(before, recipe, loaded.next_sample)
    if recipe.train.steps < loaded.step:
        raise ValueError(
            f"train.steps: {recipe.train.steps} is below the {loaded.step} steps that {run} has trained; ask for at "
            "least as many"
        )
    rows, wanted = before.train.sequences, recipe.train.sequences
    if recipe.data.order == "contiguous" and rows != wanted:
        raise ValueError(
            f"train.sequences: {wanted}: the run was started with {rows}, and in contiguous order each row of a batch "
            "goes on in the next, so their number cannot change; set it back, or start a new run folder"
        )
    return changes


def check_data(loaded: Loaded, stream: TokenStream) -> None:
    """Refuse a checkpoint whose two records of the place in the data, the trainer's and the stream's, contradict."""
    state = loaded.trainer.get("data")
    if not isinstance(state, dict):
        raise CheckpointError(f"{loaded.path / TRAINER} does not say which data come next")
    if stream.check_state(state) != loaded.next_sample:
        raise CheckpointError(
            f"{loaded.path / TRAINER} says that sample {loaded.next_sample} comes next, and that the data go on at "
            f"{state['next_sample']}; restore it from a copy, or move {loaded.path} away"
        )


def check_parameters(model: Mapping[str, torch.Size], stored: Mapping[str, Tensor], place: Path) -> None:
    """Refuse a checkpoint of another model than the one with these shapes, naming every difference."""
    wrong = [f"{name}: only in the model" for name in model.keys() - stored.keys()]
    wrong += [f"{name}: only in the checkpoint" for name in stored.keys() - model.keys()]
    wrong += [
        f"{name}: {tuple(stored[name].shape)} stored, {tuple(model[name])} in the model"
        for name in model.keys() & stored.keys()
        if model[name] != stored[name].shape
    ]
    if wrong:
        raise ValueError(f"{place} holds another model's parameters:\n  " + "\n  ".join(sorted(wrong)))


@torch.no_grad()
def read_parameters(spread: Spread, stored: Mapping[str, Tensor]) -> None:
    """Give this rank's parameters their values, reading of each whole tensor what the rank holds of it."""
    for name, parameter in spread.stored.items():
        parameter.copy_(spread.local(name, stored[name]))


class OwnMoments(Mapping[str, Tensor]):
    """What this rank stores of a checkpoint's optimizer state, each tensor cut when it is asked for."""

    def __init__(self, spread: Spread, stored: Mapping[str, Tensor]) -> None:
        self._spread, self._stored = spread, stored
        elsewhere = spread.shapes.keys() - spread.stored.keys()  # another stage's
        self._names = [n for n in stored if not n.startswith(GUARD) and n.rpartition(".")[0] not in elsewhere]

    def __getitem__(self, name: str) -> Tensor:
        tensor, owner = self._stored[name], name.rpartition(".")[0]
        cut = owner in self._spread.stored and tensor.shape == self._spread.shapes[owner]
        return self._spread.local(owner, tensor) if cut else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def guard_state(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The spike guard's part of a checkpoint's optimizer state, by its own names."""
    return {name.removeprefix(GUARD): stored[name] for name in stored if name.startswith(GUARD)}
