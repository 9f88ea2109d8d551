"""Datasets behind a URL, through the recipe and the trainer: the run from a folder, or a clear end of all ranks.

The URLs are file:// ones, so that no network is needed; what lies behind others is fetched by the same code.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from potamos.data.fetch import Retry
from potamos.data.remote import CacheSpec
from potamos.parallel.launch import Rank
from potamos.pretrain import setup, trainer

WINDOW = ("data.order=window", "data.window=2", "train.steps=8")


def stages(place: str | Path) -> str:
    return f"data.stages=[{{from: 0, mixture: [{{path: '{place}'}}]}}]"


def cache(folder: Path) -> str:
    return f"data.cache={{path: {folder}, bytes: 60000}}"  # four of the corpus's shards: two windows


def test_a_run_from_a_url_is_the_run_from_a_folder(trial: Any, tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    url = f"file://{trial.folder / 'train'}"
    assert trial.fit(near, *WINDOW) == 0
    with pytest.raises(trial.Crash):
        trial.fit(far, *WINDOW, stages(url), cache(tmp_path / "one"), kind=trial.variant(crash=6))
    # The cache may move.
    assert trial.fit(far, *WINDOW, stages(url), cache(tmp_path / "two")) == 0
    assert trial.differences(near, far) == []
    for place in ("one", "two"):
        kept = sum(path.stat().st_size for path in (tmp_path / place).rglob("*.tar"))
        assert 0 < kept <= 60000


@pytest.mark.parametrize("kind", [None, "crash"])
def test_no_fetch_outlasts_the_run(
    trial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    """Or a process that trains again would fetch for both, and leave what it was fetching in the cache."""
    far = (*WINDOW, stages(f"file://{trial.folder / 'train'}"), cache(tmp_path / "cache"), "train.steps=2")
    before, seen = fetchers(), []
    base: Any = trainer.Trainer if kind is None else trial.variant(crash=1)

    class Watched(base):
        def train_step(self, rows: Any) -> Any:
            seen.append(fetchers())
            return super().train_step(rows)

    monkeypatch.setattr(trainer, "Trainer", Watched)
    with contextlib.nullcontext() if kind is None else pytest.raises(trial.Crash):
        assert trainer.train(trial.recipe(*far), tmp_path / "run") == 0
    assert min(seen) > before, "there is something to end"
    assert fetchers() == before


def fetchers() -> int:
    return sum(thread.name == "shard-fetcher" for thread in threading.enumerate())


def test_a_shard_that_one_rank_cannot_fetch_ends_all(
    trial: Any, run_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(trial.folder / "train", tmp_path / "broken")
    for shard in broken.glob("*.tar"):
        shard.unlink()  # dataset.json is there, so the run begins
    quick = Retry(attempts=2, first=0.01)
    monkeypatch.setattr(setup, "_cache", lambda section: CacheSpec(section.path, section.bytes, retry=quick))
    place = {0: trial.folder / "train", 1: broken}

    def work(rank: int, world: int) -> tuple[str, float]:
        changes = (*WINDOW, stages(f"file://{place[rank]}"), cache(tmp_path / f"cache{rank}"))
        began = time.monotonic()
        try:
            trial.trainer(tmp_path / "run", *changes, rank=Rank(rank, world, rank, world)).fit()
        except ValueError as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began
        return "no error", 0.0

    (first, waited), (second, _) = run_ranks(2, work)
    assert second.startswith("RemoteError: ")
    assert f"{broken}/shard-00000-" in second
    assert first == f"PeerError: rank 1: {second.removeprefix('RemoteError: ')}"
    assert waited < 20
