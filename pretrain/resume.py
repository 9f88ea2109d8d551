"""Going on with a run: who may, from which checkpoint, and whether it belongs to this model."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from potamos.parallel import launch
from potamos.pretrain.checkpoint import Checkpoints, Loaded
from potamos.slurm.run_folder import RunFolder

logger = logging.getLogger(__name__)


class RunBusyError(ValueError):
    """The folder is taken: by another process that trains in it, or by other files."""


def hold(folder: RunFolder) -> TextIO:
    """Claim a run folder for as long as the returned file is open; a process that dies lets go by itself.

    A record lock, so it holds across machines where the file system supports it. Two trainings in one folder would
    replace each other's checkpoints without a word.

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
        raise RunBusyError(
            f"{folder.path} is in use by {holder}; wait for it to end, stop it, or name another folder with --run"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def newest(checkpoints: Checkpoints, rank: launch.Rank) -> Loaded | None:
    """The checkpoint to go on from, the same step on every rank: rank 0 chooses, and all must be able to read it.

    Raises:
        CheckpointError: on rank 0, none of several can be loaded; on another, it cannot read the chosen one. All ranks
            raise together.
    """
    chosen = launch.together(lambda: checkpoints.latest() if rank.is_main else None)
    step = launch.broadcast_object(None if chosen is None else chosen.step)
    if step is None:
        return None
    return launch.together(lambda: chosen or checkpoints.at(step))


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
