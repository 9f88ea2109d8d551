"""A run folder as something to use: the model of a checkpoint with its recipe and its tokenizer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from potamos.data.loader import Windows
from potamos.data.tokenizer import Tokenizer
from potamos.pretrain import setup
from potamos.pretrain.checkpoint import Checkpoints, Loaded, load, step_folders
from potamos.pretrain.config import parse_recipe
from potamos.pretrain.evaluate import Score, score
from potamos.pretrain.models.linear import set_compute_dtype
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.objectives.base import System
from potamos.pretrain.recipe import Recipe
from potamos.slurm.run_folder import RunFolder


class RunError(ValueError):
    """A run folder that cannot be used as asked; names the folder and the remedy."""


@dataclass(frozen=True)
class Run:
    """An opened run: its system in evaluation mode, as it was after ``step`` steps and ``next_sample`` samples."""

    folder: RunFolder
    recipe: Recipe
    system: System
    tokenizer: Tokenizer
    device: torch.device
    step: int
    next_sample: int

    @property
    def model(self) -> Model:
        return self.system.model


def open_run(
    run: str | os.PathLike[str], *, step: int | None = None, device: str = "cpu", overrides: Sequence[str] = ()
) -> Run:
    """Open a run folder for evaluation and generation; nothing in it is changed, so it may be training meanwhile.

    The recipe is the checkpoint's own. On a CPU the model computes in fp32 whatever the recipe's precision, which is
    faster there than bf16.

    Args:
        step: which checkpoint; None for the newest that is sound.
        device: ``auto``, ``cpu`` or ``cuda``.
        overrides: ``key=value`` changes to the recipe that leave the parameters as they are, such as another pattern.

    Raises:
        RunError: no such folder, no such checkpoint or none yet, a changed tokenizer, parameters that do not fit.
        RecipeError: overrides that the recipe refuses.
        CheckpointError: the checkpoint is damaged.
    """
    folder, place = RunFolder.of(run), setup.pick_device(device)
    loaded = _load(folder, step)
    recipe = parse_recipe(loaded.recipe, str(loaded.path / "recipe.yaml"), overrides)
    tokenizer = _open_tokenizer(folder, recipe, loaded)
    system = setup.build_system(recipe, place)
    if place.type == "cpu":
        set_compute_dtype(system, None)
    try:
        system.load_state_dict(loaded.model)
    except RuntimeError as error:  # names every parameter that differs
        changed = f" with {' '.join(overrides)}" if overrides else ""
        raise RunError(f"{loaded.path} does not fit the model of its recipe{changed}: {error}") from None
    return Run(folder, recipe, system.eval(), tokenizer, place, loaded.step, loaded.next_sample)


def load_run(run: str | os.PathLike[str], step: int | None = None) -> Loaded:
    """A run's checkpoint as it is on the disk: the newest that is sound, or that of one step. Raises as `open_run`."""
    return _load(RunFolder.of(run), step)


def score_run(
    run: Run, data: str | os.PathLike[str] | None = None, *, length: int | str | None = None
) -> dict[str, Score]:
    """Scores by name of all of ``data``, or of every validation dataset of the recipe.

    Args:
        length: tokens of a row, or a multiple of the training rows ("4x"); None for the training length. Every length
            scores the same tokens, so scores compare; a batch holds about as many tokens as one of training.

    Raises:
        RunError: no validation data, or a length that is no number or that the model's positions do not reach.
    """
    trained = run.recipe.data.sequence_length
    rows = trained if length is None else _row_length(length, trained)
    limit = run.model.max_positions
    if limit is not None and rows > limit:
        raise RunError(
            f"length {length}: rows of {rows} tokens, but the positions of this model end at {limit}; evaluate at most "
            "that, or train one whose positions have no end (rope, alibi, ...; of xpos, a larger scale_base moves it)"
        )
    recipe = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"sequence_length": rows})})
    if data is None:
        held_out = {v.name: v.windows for v in setup.open_validation(recipe, run.tokenizer)}
    else:
        held_out = {os.fspath(data): _windows(recipe, run.tokenizer, data)}
    if not held_out:
        raise RunError(f"the recipe of {run.folder.path} names no validation data; name a dataset with --data")
    return {
        name: score(
            run.system,
            windows,
            run.tokenizer.token_bytes(),
            device=run.device,
            rows_per_batch=max(1, run.recipe.train.micro_sequences * trained // rows),
            seed=run.recipe.train.seed,
        )
        for name, windows in held_out.items()
    }


def _windows(recipe: Recipe, tokenizer: Tokenizer, data: str | os.PathLike[str]) -> Windows:
    return Windows(
        data,
        sequence_length=recipe.data.sequence_length,
        boundaries=recipe.data.boundaries,
        tokenizer_sha256=tokenizer.sha256,
        vocabulary=tokenizer.vocabulary,
    )


def _row_length(length: int | str, trained: int) -> int:
    found = re.fullmatch(r"(\d+)(x?)", str(length))
    rows = 0 if found is None else int(found[1]) * (trained if found[2] else 1)
    if rows < 1:
        raise RunError(
            f"length {length!r} is neither a number of tokens (as in {4 * trained}) nor a multiple of the training "
            "rows (as in 4x)"
        )
    return rows


def _load(folder: RunFolder, step: int | None) -> Loaded:
    if not folder.path.is_dir():
        raise RunError(f"there is no run folder {folder.path}{_others(folder.path)}")
    steps = step_folders(folder.checkpoints)
    if not steps:
        raise RunError(f"{folder.path} holds no checkpoint yet{_progress(folder)}")
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, sorted(steps)))
            raise RunError(f"{folder.path} holds no checkpoint of step {step}; there are those of steps {known}")
        return load(steps[step])
    # Not the main rank: a reader never cleans up in a folder where a run may be writing.
    loaded = Checkpoints(folder.checkpoints, main=False).latest()
    assert loaded is not None, "there is a step folder, so latest() loads one or raises"
    return loaded


def _others(path: Path) -> str:
    """What to do about a missing folder: the runs beside it, or how to make one."""
    parent = path.parent if path.parent.is_dir() else Path("runs")
    runs = sorted(str(p.parent) for p in parent.glob("*/checkpoints"))
    return f"; there are: {', '.join(runs)}" if runs else "; train one: potamos train RECIPE --run " + str(path)


def _progress(folder: RunFolder) -> str:
    try:
        step = int(json.loads(folder.state.read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return "; train it first: potamos train RECIPE --run " + str(folder.path)
    return f"; it stands at step {step}, wait for its first save"


def _open_tokenizer(folder: RunFolder, recipe: Recipe, loaded: Loaded) -> Tokenizer:
    """The run's own copy, else the recipe's file; it must be the one that the model was trained on."""
    copy = setup.tokenizer_copy(folder.path, recipe.tokenizer.kind)
    path = copy if copy.exists() else Path(recipe.tokenizer.path)
    tokenizer = setup.load(recipe.tokenizer, path)
    trained_on = loaded.trainer.get("tokenizer")
    if trained_on is not None and trained_on != tokenizer.sha256:
        raise RunError(
            f"tokenizer {path} (sha256 {tokenizer.sha256[:12]}) is not the one that {folder.path} was trained on "
            f"({trained_on[:12]}): restore that file"
        )
    return tokenizer
