"""Checkpoints: complete or absent, whatever is killed, full, truncated or planted."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from potamos.parallel import storage
from potamos.pretrain import checkpoint
from potamos.pretrain.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointWriteError,
    Snapshot,
    load,
    step_folders,
)


def make_snapshot(step: int, size: int = 64) -> Snapshot:
    """A snapshot whose every value follows from `step`, so that a stale or mixed one is seen."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(size, 3, generator=generator)
    return Snapshot(
        step=step,
        next_sample=step * 8,
        model={"layers.0.weight": weight, "layers.0.bias": torch.full((3,), float(step))},
        optimizer={"layers.0.weight.exp_avg": weight * 2, "layers.0.weight.step": torch.tensor(float(step))},
        trainer={"attempt": 1, "rate": 0.1 + step, "nested": {"list": [1, 2.5, None]}},
        recipe=f"name: trial\n# step {step}\n",
    )


def assert_same(found: Snapshot, meant: Snapshot) -> None:
    assert (found.step, found.next_sample, found.recipe) == (meant.step, meant.next_sample, meant.recipe)
    assert found.trainer == meant.trainer
    for part in ("model", "optimizer", "carried"):
        left, right = getattr(found, part), getattr(meant, part)
        assert left.keys() == right.keys()
        for name in right:
            assert left[name].dtype == right[name].dtype
            assert left[name].shape == right[name].shape
            assert torch.equal(left[name], right[name]), (part, name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_dtype_shape_and_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45])
    tensors: dict[str, Tensor] = {
        str(dtype): (torch.arange(6) - 2).abs().to(dtype).view(2, 3) for dtype in storage.DTYPES
    }
    tensors |= {
        "scalar": torch.tensor(3.25),
        "scalar.bool": torch.tensor(True),
        "scalar.int": torch.tensor(2**62 + 1),
        "empty": torch.empty(0, 3),
        "odd": odd,
        "transposed": torch.randn(3, 4).t(),
        "expanded": torch.ones(1).expand(4),
        "slice": torch.randn(4, 4)[1:, ::2],
        "grad": torch.randn(2, requires_grad=True),
    }
    snapshot = Snapshot(step=7, next_sample=56, model=tensors, carried={"state": torch.randn(2, 3).to(torch.complex64)})
    Checkpoints(tmp_path, keep=1).save(snapshot, wait=True)
    found = load(tmp_path / "step-00000007")
    for name, tensor in tensors.items():
        left, right = found.model[name], tensor.detach().contiguous()
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8)) or left.numel() == 0, name
    assert torch.equal(found.carried["state"], snapshot.carried["state"])
    assert found.optimizer == {}
    assert names(tmp_path / "step-00000007") == ["carried", "manifest.json", "model", "recipe.yaml", "trainer.json"]


def test_large_sets_are_split_over_files(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.full((100,), float(i)) for i in range(7)}
    storage.write_tensors(tmp_path, tensors, file_bytes=900)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    found = storage.StoredTensors(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_training_may_change_tensors_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: a second save waits for the first, and nothing has its final name before it is finished."""
    go, writing = threading.Event(), threading.Event()
    write = checkpoint.write_tensors

    def slow(*args: object, **kwargs: object) -> None:
        writing.set()
        assert go.wait(20)
        write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    checkpoints = Checkpoints(tmp_path, keep=2)
    snapshot = make_snapshot(3)
    checkpoints.save(snapshot)
    for tensor in [*snapshot.model.values(), *snapshot.optimizer.values()]:
        tensor.zero_()
    snapshot.trainer["nested"]["list"].append("later")
    assert writing.wait(20)
    assert step_folders(tmp_path) == {}
    second = threading.Thread(target=checkpoints.save, args=(make_snapshot(4),))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    go.set()
    second.join(20)
    checkpoints.wait()
    assert_same(load(tmp_path / "step-00000003"), make_snapshot(3))
    assert_same(load(tmp_path / "step-00000004"), make_snapshot(4))


def test_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=30)
    for step in range(10, 101, 10):
        checkpoints.save(make_snapshot(step, size=1), wait=True)
    assert list(step_folders(tmp_path)) == [30, 60, 90, 100]
    assert names(tmp_path) == [f"step-{s:08d}" for s in (30, 60, 90, 100)]
    assert_same(checkpoints.latest() or pytest.fail("nothing"), make_snapshot(100, size=1))


def test_a_corrupt_later_step_never_pushes_out_the_good_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (10, 20):
        Checkpoints(tmp_path, keep=9).save(make_snapshot(step, size=1), wait=True)
    (tmp_path / "step-00000020" / "trainer.json").unlink()
    assert (checkpoints.latest() or pytest.fail("nothing")).step == 10
    checkpoints.save(make_snapshot(15, size=1), wait=True)
    assert list(step_folders(tmp_path)) == [15, 20]
    checkpoints.save(make_snapshot(20, size=1), wait=True)  # the replay replaces the corrupt one
    assert list(step_folders(tmp_path)) == [20]
    assert_same(load(tmp_path / "step-00000020"), make_snapshot(20, size=1))


def test_a_corrupt_earlier_step_is_not_counted(tmp_path: Path) -> None:
    for step in (10, 20):
        Checkpoints(tmp_path, keep=9).save(make_snapshot(step, size=1), wait=True)
    (tmp_path / "step-00000020" / "recipe.yaml").unlink()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert (checkpoints.latest() or pytest.fail("nothing")).step == 10
    checkpoints.save(make_snapshot(25, size=1), wait=True)
    assert list(step_folders(tmp_path)) == [10, 25]


# ---- damage ------------------------------------------------------------------------------------------------------


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


WEIGHTS = "model/model-00001-of-00001.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flipped in the header": (WEIGHTS, lambda path: flip(path, 0.1)),
    "flipped in the last weight": (WEIGHTS, lambda path: flip(path, 1.0)),
    "truncated": (WEIGHTS, truncate),
    "empty": (WEIGHTS, lambda path: path.write_bytes(b"")),
    "missing": (WEIGHTS, Path.unlink),
    "optimizer folder missing": ("optimizer", shutil.rmtree),
    "scalars flipped": ("trainer.json", lambda path: flip(path, 0.5)),
    "recipe truncated": ("recipe.yaml", truncate),
    "manifest missing": ("manifest.json", Path.unlink),
    "manifest truncated": ("manifest.json", truncate),
    "manifest of something else": ("manifest.json", lambda path: path.write_text("[]")),
    "manifest of a later version": (
        "manifest.json",
        lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 2')),
    ),
    "an extra file of tensors": (
        "model",
        lambda path: save_file({"more": torch.ones(1)}, path / "more.safetensors"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(make_snapshot(step, size=4), wait=True)
    name, hurt = DAMAGE[damage]
    hurt(tmp_path / "step-00000002" / name)
    with caplog.at_level(logging.WARNING):
        found = Checkpoints(tmp_path).latest()
    assert_same(found or pytest.fail("nothing"), make_snapshot(1, size=4))
    assert "skipping checkpoint step-00000002" in caplog.text
    assert name.split("/")[0] in caplog.text
    if damage == "truncated":
        assert " bytes instead of " in caplog.text


def test_every_flipped_byte_of_the_weights_is_found(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(make_snapshot(1, size=2), wait=True)
    path = tmp_path / "step-00000001" / WEIGHTS
    content = path.read_bytes()
    for index in range(0, len(content), 7):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises(CheckpointError, match="model-00001"):
            load(tmp_path / "step-00000001")
    path.write_bytes(content)
    assert_same(load(tmp_path / "step-00000001"), make_snapshot(1, size=2))


def test_none_is_no_checkpoint_and_all_corrupt_is_an_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    checkpoints.save(make_snapshot(1, size=1), wait=True)
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints[\s\S]*manifest\.json is missing"):
        checkpoints.latest()
    with pytest.raises(CheckpointError, match=r"step-00000009/manifest\.json is missing"):
        load(tmp_path / "checkpoints" / "step-00000009")


class Bomb:
    """Unpickled, it makes a folder: that is how an executed pickle is seen."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_planted_pickle_is_never_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.is_dir()  # the bomb works
    trace.rmdir()

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(make_snapshot(step, size=2), wait=True)
    newest = tmp_path / "checkpoints" / "step-00000002"
    planted = [".metadata", "model/.metadata", "optimizer/.metadata", "model/__0_0.distcp", "trainer.pt", "model.pkl"]
    for name in planted:
        (newest / name).write_bytes(bomb)
    assert_same(checkpoints.latest() or pytest.fail("nothing"), make_snapshot(2, size=2))

    # Instead of weights or scalars, and the manifest agrees with it: refused, still not executed.
    for name in (WEIGHTS, "trainer.json", "recipe.yaml"):
        good, manifest = (newest / name).read_bytes(), (newest / "manifest.json").read_text()
        (newest / name).write_bytes(bomb)
        forged = json.loads(manifest)
        forged["files"][name] = {"bytes": len(bomb), "sha256": checkpoint._digest(newest / name)}
        (newest / "manifest.json").write_text(json.dumps(forged))
        with pytest.raises(CheckpointError):
            load(newest)
        assert_same(checkpoints.latest() or pytest.fail("nothing"), make_snapshot(1, size=2))
        (newest / name).write_bytes(good)
        (newest / "manifest.json").write_text(manifest)
    assert not trace.exists()


def test_no_pickle_is_written(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(make_snapshot(1), wait=True)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


# ---- failing writes ----------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(make_snapshot(1), wait=True)
    assert checkpoints.failed is None
    write = checkpoint.write_tensors

    def full(folder: Path, tensors: dict[str, Tensor]) -> None:
        if folder.name == "optimizer":  # the model is on the disk already
            (folder.parent / "partial").write_bytes(b"x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with caplog.at_level(logging.WARNING):
        checkpoints.save(make_snapshot(2))
        checkpoints.save(make_snapshot(3))  # a failed periodic save does not end training
        with pytest.raises(CheckpointWriteError, match="No space left"):
            checkpoints.wait()
    for text in ("step-00000002 was not written", "No space left", "The last one is step-00000001", "Make room"):
        assert text in caplog.text
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.failed == (3, "No space left on device")
    with pytest.raises(CheckpointWriteError, match=r"step-00000004 was not written.*No space left"):
        checkpoints.save(make_snapshot(4), wait=True)
    assert_same(checkpoints.latest() or pytest.fail("nothing"), make_snapshot(1))

    monkeypatch.undo()  # room again
    checkpoints.save(make_snapshot(5), wait=True)
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoints.failed is None


def test_a_fault_in_the_writer_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(folder: Path, tensors: dict[str, Tensor]) -> None:
        raise TypeError("a fault of ours")

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "write_tensors", faulty)
    checkpoints.save(make_snapshot(1))
    with pytest.raises(TypeError, match="a fault of ours"):  # at the latest where it would happen again
        checkpoints.save(make_snapshot(2))
    with pytest.raises(TypeError, match="a fault of ours"):
        checkpoints.save(make_snapshot(3), wait=True)
    assert "Make room" not in caplog.text
    assert names(tmp_path) == []


def test_a_file_size_limit_of_the_system_is_reported(tmp_path: Path) -> None:
    """The real thing: the kernel refuses to write on in the middle of a file."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_snapshot(1), wait=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CheckpointWriteError, match="File too large"):
            checkpoints.save(make_snapshot(2, size=50_000), wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-00000001"]


def test_headers_are_read_back_before_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_tensors

    def forgetful(folder: Path, tensors: dict[str, Tensor]) -> None:
        write(folder, {name: value for name, value in tensors.items() if not name.endswith("bias")})

    monkeypatch.setattr(checkpoint, "write_tensors", forgetful)
    with pytest.raises(CheckpointWriteError, match=r"other tensors than were written: \['layers.0.bias'\]"):
        Checkpoints(tmp_path).save(make_snapshot(1), wait=True)
    assert names(tmp_path) == []


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"optimizer\['lr'\] is of type float"):
        checkpoints.save(Snapshot(1, 8, {}, {"lr": 0.1}))  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="complex128"):
        checkpoints.save(Snapshot(1, 8, {"a": torch.zeros(2, dtype=torch.complex128)}))
    with pytest.raises(CheckpointError, match="not JSON"):
        checkpoints.save(Snapshot(1, 8, {}, trainer={"a": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"checkpoint\.keep is 0"):
        Checkpoints(tmp_path, keep=0)
    assert names(tmp_path) == []


def test_only_the_main_rank_writes_and_all_learn_how_it_went(tmp_path: Path) -> None:
    met: list[str] = []

    def together(name: str) -> Callable[[Callable[[], None]], None]:
        return lambda action: (met.append(name), action())[1]

    other = Checkpoints(tmp_path / "checkpoints", main=False, together=together("other"))
    other.save(make_snapshot(1))
    other.save(make_snapshot(1), wait=True)
    assert not (tmp_path / "checkpoints").exists()
    assert other.latest() is None
    main = Checkpoints(tmp_path / "checkpoints", together=together("main"))
    main.save(make_snapshot(1))
    main.save(make_snapshot(2), wait=True)
    assert (main.latest() or pytest.fail("nothing")).step == 2
    assert (other.latest() or pytest.fail("nothing")).step == 2
    assert met == ["other"] * 3 + ["main"] * 3  # each when it begins, and in every save


# ---- kills -------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(3)
    return pid


def test_sigkill_at_any_moment_leaves_a_valid_latest(tmp_path: Path) -> None:
    moments = random.Random(7)
    reached, in_save = 0, 0
    Checkpoints(tmp_path / "warm").save(make_snapshot(1), wait=True)  # imports the storage before the children fork
    load(tmp_path / "warm" / "step-00000001")
    shutil.rmtree(tmp_path / "warm")

    def train() -> None:
        checkpoints = Checkpoints(tmp_path, keep=1)  # the hardest: each save also deletes the one before it
        loaded = checkpoints.latest()
        for step in range((loaded.step if loaded else 0) + 1, 10**6):
            checkpoints.save(make_snapshot(step, size=20_000))

    for _ in range(60):  # 12 on an idle machine; a busy one gets to save less between two kills
        if reached > 12 and in_save > 3:  # the kills did hit saves
            return
        pid = fork(train)
        time.sleep(moments.uniform(0.02, 0.35))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        in_save += any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
        checkpoints = Checkpoints(tmp_path, keep=1)
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        for path in step_folders(tmp_path).values():
            load(path)  # not only the newest: nothing partial has a final name
        if loaded := checkpoints.latest():
            assert_same(loaded, make_snapshot(loaded.step, size=20_000))
            assert loaded.step >= reached
            reached = loaded.step
    pytest.fail(f"60 kills hit {in_save} saves, and {reached} checkpoints were written")


@pytest.mark.parametrize("fatal", range(1, 4))
def test_sigkill_between_the_renames(fatal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing a checkpoint of the same step and deleting an old one are several renames; die before each of them."""
    for step in (1, 2):
        Checkpoints(tmp_path, keep=9).save(make_snapshot(step, size=1), wait=True)
    rename, calls = os.rename, [0]

    def deadly(*args: Path) -> None:
        calls[0] += 1
        if calls[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)

    monkeypatch.setattr(checkpoint.os, "rename", deadly)
    pid = fork(lambda: print(Checkpoints(tmp_path, keep=1).save(make_snapshot(2, size=1), wait=True)))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert_same(checkpoints.latest() or pytest.fail("nothing"), make_snapshot(2, size=1))
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_living_process_keeps_its_temporary_folder(tmp_path: Path) -> None:
    living, dead = tmp_path / f".tmp-step-00000001-{os.getppid()}", tmp_path / ".tmp-step-00000001-4194305"
    living.mkdir()
    dead.mkdir()
    Checkpoints(tmp_path)
    assert living.is_dir()
    assert not dead.exists()


def test_everything_is_on_the_disk_before_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss keeps no order but that of fsync: files and their folders first, then the name, then its folder."""
    events: list[tuple[str, str]] = []
    flush, rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    def renaming(old: Path, new: Path) -> None:
        events.append(("rename", str(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming)
    path = Checkpoints(tmp_path).save(make_snapshot(3), wait=True)
    at = events.index(("rename", str(path)))
    assert events[at + 1] == ("fsync", str(tmp_path))
    flushed = {name for kind, name in events[:at] if kind == "fsync"}
    written = {str(item.relative_to(path)) for item in path.rglob("*")}
    assert {name.split(f"/.tmp-{path.name}-")[1].partition("/")[2] for name in flushed} == {*written, ""}
