"""Many ranks open one checkpoint: each reads and holds its own part, and damage that one finds is found for all."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from potamos.parallel import launch, storage
from potamos.parallel.launch import Rank
from potamos.pretrain import carried, checkpoint, resume
from potamos.pretrain.checkpoint import CheckpointError, Checkpoints, Snapshot, load

pytestmark = [pytest.mark.resume, pytest.mark.distributed]

# --- what is held -----------------------------------------------------------------------------------------------------

WIDE = ("model.width=256", "model.layers=6", "train={steps: 2, sequences: 4, micro_sequences: 1, seed: 5, device: cpu}")
WIDE += ("optimizer={kind: adamw, lr: 1.0e-3}", "validate={every: 9, sequences: 1}")
SLACK = 3 << 20  # interpreter, headers, and pages that the kernel maps ahead


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def forget_peak() -> None:
    """Begin anew, with what earlier allocations freed given back: it would take up new ones unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def wide(trial, tmp_path_factory):
    """A run of a model that is large beside what a process allocates for itself: 60 MB on the disk."""
    run = tmp_path_factory.mktemp("wide") / "run"
    assert trial.fit(run, *WIDE, kind=trial.variant(stop=0)) == 0
    return run


def restoring(trial, run, axes: str, tmp_path):
    """(peak of memory while a rank finds and restores its checkpoint, bytes of its moments) of each rank."""

    def work(rank: int, world: int) -> tuple[int, int]:
        shutil.copytree(run, tmp_path / "run") if rank == 0 else None
        launch.barrier()
        newest, seen = resume.newest, []

        def watched(*arguments):
            forget_peak()
            seen.append(memory("VmRSS"))
            return newest(*arguments)

        class Watched(trial.variant()):
            def restore(self, loaded):
                super().restore(loaded)
                seen.append(memory("VmHWM"))

        resume.newest = watched
        place = Rank(rank, world, rank, world)
        made = trial.trainer(tmp_path / "run", *WIDE, f"parallel={{dp_replicate: 1, {axes}}}", rank=place, kind=Watched)
        made.telemetry.close("built only")
        return seen[1] - seen[0], sum(t.nbytes for t in made.optimizer.state_tensors().values())

    return work


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(
    ("axes", "eager"),
    [("pp: 2", False), ("tp: 2", False), ("dp_shard: 2", False), ("pp: 2", True)],
    ids=["pp", "tp", "dp_shard", "pp, all read at once"],
)
def test_a_rank_holds_its_own_part_of_a_checkpoint(trial, tmp_path, run_ranks, wide, monkeypatch, axes, eager):
    """Its moments, that is, since its parameters have their memory before; and one tensor that is just being read."""
    if eager:
        stored = storage.StoredTensors
        monkeypatch.setattr(
            checkpoint, "StoredTensors", lambda folder: {k: v.clone() for k, v in stored(folder).items()}
        )
    found = trial.newest(wide)
    on_disk = sum(t.nbytes for part in (found.model, found.optimizer) for t in part.values())
    largest = max(t.nbytes for t in found.model.values())
    assert on_disk > 50 << 20
    ranks = run_ranks(2, restoring(trial, wide, axes, tmp_path))
    print(f"{axes}: {on_disk >> 20} MiB on the disk, {[(p >> 10, m >> 10) for p, m in ranks]} KiB")
    for peak, moments in ranks:
        assert moments < 0.4 * on_disk
        if eager:
            assert peak > on_disk + moments - SLACK
        else:
            assert peak < moments + 2 * largest + SLACK


# --- what is found ----------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        weights = {f"layers.{i}.weight": torch.full((5, 3), float(step + i)) for i in range(3)}
        checkpoints.save(
            Snapshot(step, 8 * step, weights, {f"{n}.exp_avg": 2 * t for n, t in weights.items()}), wait=True
        )


def opened(folder: Path, rank: int, world: int) -> int | str:
    """The step that a rank goes on from, or its error."""
    checkpoints = Checkpoints(folder, main=rank == 0, together=launch.together)
    try:
        loaded = resume.newest(checkpoints, Rank(rank, world, rank, world))
    except (CheckpointError, launch.PeerError) as error:
        return str(error)
    assert loaded is not None
    assert loaded.model["layers.2.weight"][0, 0] == loaded.step + 2
    return loaded.step


def test_every_file_is_digested_by_one_rank(tmp_path, run_ranks, monkeypatch):
    fill(tmp_path)
    digest, read = checkpoint._digest, []
    monkeypatch.setattr(checkpoint, "_digest", lambda path: (read.append(path.name), digest(path))[1])

    def work(rank: int, world: int) -> list[str]:
        read.clear()
        assert opened(tmp_path, rank, world) == 2
        return list(read)

    for world in (1, 2, 3):
        shares = run_ranks(world, work)
        written = [path.name for path in (tmp_path / "step-00000002").rglob("*.*") if path.name != checkpoint.MANIFEST]
        assert sorted(name for share in shares for name in share) == sorted(written)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


FILES = ["model/model-00001-of-00001.safetensors", "optimizer/model-00001-of-00001.safetensors", "trainer.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_damage_is_found_by_all_whoever_reads_it(tmp_path, run_ranks, name, world, caplog):
    fill(tmp_path)
    path = tmp_path / "step-00000002" / name
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        assert run_ranks(world, lambda rank, world: opened(tmp_path, rank, world)) == [1] * world
        path.write_bytes(content)
    assert run_ranks(world, lambda rank, world: opened(tmp_path, rank, world)) == [2] * world


def sealed(step: Path, text: str) -> None:
    """Give trainer.json another content, with the size and digest that the manifest then has."""
    (step / "trainer.json").write_text(text)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))


def with_bytes(step: Path, value: str) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["trainer.json"]["bytes"] = "HERE"
    (step / "manifest.json").write_text(json.dumps(manifest).replace('"HERE"', value))


DEEP = "[" * 100_000 + "]" * 100_000
NONSENSE = {
    "bytes without end": ("manifest.json", lambda step: with_bytes(step, "Infinity")),
    "bytes that are no number": ("manifest.json", lambda step: with_bytes(step, "NaN")),
    "bytes of a list": ("manifest.json", lambda step: with_bytes(step, "[]")),
    "deep manifest": ("manifest.json", lambda step: (step / "manifest.json").write_text(DEEP)),
    "deep scalars": ("trainer.json", lambda step: sealed(step, DEEP)),
    "a list of scalars": ("trainer.json", lambda step: sealed(step, "[]")),
    "step in words": ("trainer.json", lambda step: sealed(step, '{"step": "2", "next_sample": 16, "trainer": {}}')),
    "half a sample": ("trainer.json", lambda step: sealed(step, '{"step": 2, "next_sample": 16.5, "trainer": {}}')),
    "trainer of text": ("trainer.json", lambda step: sealed(step, '{"step": 2, "next_sample": 16, "trainer": "x"}')),
    "nothing of it": ("trainer.json", lambda step: sealed(step, "{}")),
}


@pytest.mark.parametrize("damage", NONSENSE)
def test_what_no_checkpoint_says_is_skipped_by_all(tmp_path, run_ranks, damage):
    """Well-formed or not, and with a right digest: the file is named, and the checkpoint before is taken."""
    fill(tmp_path)
    name, hurt = NONSENSE[damage]
    hurt(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match=rf"step-00000002/{name} is malformed"):
        load(tmp_path / "step-00000002")
    assert run_ranks(2, lambda rank, world: opened(tmp_path, rank, world)) == [1, 1]


@pytest.mark.parametrize("blind", [0, 1])
def test_a_folder_that_cannot_be_listed_stops_all_or_none(tmp_path, run_ranks, monkeypatch, blind):
    """Only the main rank's listing counts; where that fails, the others do not wait for it."""
    fill(tmp_path)

    def work(rank: int, world: int) -> int | str:
        def failing(folder: Path) -> dict[int, Path]:
            raise PermissionError(13, "Permission denied", str(folder))

        if rank == blind:
            monkeypatch.setattr(checkpoint, "step_folders", failing)
        return opened(tmp_path, rank, world)

    found = run_ranks(2, work, timeout=30)
    if blind == 1:
        assert found == [2, 2]
    for words in found if blind == 0 else ():
        assert f"{tmp_path} cannot be listed: [Errno 13] Permission denied" in words


CARRYING = ("data.order=contiguous", "parallel={dp_replicate: 1, dp_shard: 2}", "train.steps=4")


def test_rows_that_carry_state_go_on_where_parameters_are_sharded(trial, tmp_path, run_ranks):
    """The example of the state comes from the whole system: it alone gathers what lies outside the blocks."""

    def train(rank: int, world: int, run: str, stop: int) -> tuple[int, int]:
        place, kind = Rank(rank, world, rank, world), trial.variant(stop=stop)
        made = trial.trainer(tmp_path / run, *CARRYING, rank=place, kind=kind)
        return made.step, made.fit()

    run_ranks(2, train, "whole", -1)
    run_ranks(2, train, "pieces", 1)
    assert [began for began, _ in run_ranks(2, train, "pieces", -1)] == [2, 2]
    assert trial.differences(tmp_path / "whole", tmp_path / "pieces") == []


@pytest.mark.parametrize("place", ["parameters", "rows", "state"])
def test_a_rank_that_cannot_read_its_part_ends_all(trial, tmp_path, run_ranks, monkeypatch, place):
    """Others would gather sharded parameters, for an example of the state that rows carry, and wait for it."""

    def train(rank: int, world: int) -> int:
        return trial.trainer(tmp_path / "run", *CARRYING, rank=Rank(rank, world, rank, world), kind=stopping).fit()

    stopping = trial.variant(stop=2)
    run_ranks(2, train)
    assert trial.newest(tmp_path / "run").carried

    def work(rank: int, world: int) -> tuple[str, float]:
        def failing(*_: object) -> None:
            raise OSError(5, "Input/output error", "a disk")

        if rank == 1 and place == "parameters":
            monkeypatch.setattr(resume, "read_parameters", failing)
        elif rank == 1 and place == "state":
            monkeypatch.setattr(carried, "scatter", failing)

        class Unread(trial.variant()):
            def restore(self, loaded):
                assert loaded.carried
                if rank == 1 and place == "rows":
                    self.stream.rows = failing
                super().restore(loaded)

        began = time.monotonic()
        try:
            trial.trainer(tmp_path / "run", *CARRYING, rank=Rank(rank, world, rank, world), kind=Unread)
        except Exception as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began
        return "restored", 0.0

    (first, waited), (second, _) = run_ranks(2, work)
    assert first == "PeerError: rank 1: [Errno 5] Input/output error: 'a disk'"
    assert second == "OSError: [Errno 5] Input/output error: 'a disk'"
    assert waited < 20


def test_a_rank_that_sees_another_disk_is_not_left_behind(tmp_path, run_ranks):
    """Nothing there, or a sound checkpoint of the same step with other values: neither may be read beside rank 0's."""
    fill(tmp_path / "shared")
    (tmp_path / "empty").mkdir()
    Checkpoints(tmp_path / "other").save(Snapshot(2, 16, {"layers.2.weight": torch.full((5, 3), 4.0)}), wait=True)
    for place, words in (("empty", "manifest.json is missing"), ("other", "another file here than on rank 0")):
        errors = run_ranks(
            3, lambda rank, world, p=place: opened(tmp_path / ("shared" if rank < 2 else p), rank, world)
        )
        for error in errors:
            assert "none of the 2 checkpoints in" in error
            assert f"rank 2: {tmp_path / place}" in error
            assert words in error


def test_the_main_rank_says_what_is_skipped(tmp_path, run_ranks, monkeypatch):
    fill(tmp_path)
    (tmp_path / "step-00000002" / "recipe.yaml").unlink()

    def work(rank: int, world: int) -> list[str]:
        said = []
        monkeypatch.setattr(checkpoint.logger, "warning", lambda form, *values: said.append(form % values))
        assert opened(tmp_path, rank, world) == 1
        return said

    first, second = run_ranks(2, work)
    assert first == [f"skipping checkpoint step-00000002: rank 0: {tmp_path}/step-00000002/recipe.yaml is missing"]
    assert second == []


# --- one tensor -------------------------------------------------------------------------------------------------------


def test_tensors_are_read_anew_and_the_disk_is_never_written(tmp_path):
    storage.write_tensors(tmp_path, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "c": torch.ones(2)})
    stored = storage.StoredTensors(tmp_path)
    assert sorted(stored) == ["a", "b", "c"]
    assert "a" in stored
    assert "d" not in stored
    with pytest.raises(KeyError):
        stored["d"]
    stored["a"].zero_()
    assert torch.equal(stored["a"], torch.arange(6.0).view(2, 3))


def test_a_file_that_is_gone_is_said_when_it_is_read(tmp_path):
    Checkpoints(tmp_path).save(Snapshot(1, 8, {"a": torch.ones(3)}), wait=True)
    found = load(tmp_path / "step-00000001")
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises((OSError, storage.StorageError), match=r"model-00001"):
        found.model["a"]
