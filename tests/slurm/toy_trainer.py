"""In place of the trainer, where a test is about Slurm and the batch script: the same marks, without torch.

`toy.json` in the run folder says what happens:
    steps     in all; `every` so many a checkpoint
    hold      wait at this step until the file `go` is there
    import    the attempt that installs no handlers until the file `imported` is there
    busy      attempts that find the run's lock held
    deaf      attempts whose ranks hear no request to stop, and never end
    die       {"step", "rank", "status", "attempts"}: a rank ends there with that status in those attempts
Ranks take each step together. A request to stop is not agreed upon, as the trainer would: all ranks get it anyway.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    rank, attempt = int(os.environ["SLURM_PROCID"]), int(os.environ["POTAMOS_ATTEMPT"])
    plan = json.loads(Path("toy.json").read_text())
    write(f"importing.{attempt}.{rank}", os.getpid())
    while plan.get("import") == attempt and not Path("imported").exists():
        time.sleep(0.02)
    if attempt in plan.get("busy", ()):
        if rank == 0:
            write(f"busy.{attempt}", json.dumps({"attempt": attempt, "holder": "process 7 on vm"}))
        return 2
    asked: list[str] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1, signal.SIGTERM))
    if attempt in plan.get("deaf", ()):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        plan["hold"] = 0
    facts = ("SLURMD_NODENAME", "SLURM_NODEID", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT")
    write(f"began.{attempt}.{rank}", json.dumps({name: os.environ.get(name, "") for name in facts}))

    step = max((int(path.name[5:]) for path in Path("checkpoints").glob("step-*")), default=0)
    while step < plan["steps"] and not asked:
        while step == plan.get("hold") and not asked and not Path("go").exists():
            time.sleep(0.02)
        if asked:
            break
        time.sleep(0.02)
        step += 1
        die = plan.get("die", {})
        if step == die.get("step") and rank == die["rank"] and attempt in die["attempts"]:
            write(f"died.{attempt}", rank)
            print(f"RuntimeError: step {step} cannot be done", file=sys.stderr, flush=True)
            return die["status"]
        meet(attempt, rank, step, asked)
        if not asked and step % plan.get("every", 1) == 0:
            save(rank, step)
        print(f"attempt {attempt} step {step}", flush=True)
    if asked and Path(f"died.{attempt}").exists():
        return 1  # srun ends the others; real ranks cannot agree to stop with one that is gone
    if rank == 0 and asked:
        save(rank, step)
        write(f"stop.{attempt}", json.dumps({"attempt": attempt, "reason": asked[0], "step": step}))
    elif rank == 0:
        write("done.json", json.dumps({"step": step}))
    return 0


def meet(attempt: int, rank: int, step: int, asked: list[str]) -> None:
    """Until every rank has come as far, or this one is asked to stop."""
    write(f"at.{attempt}.{rank}", step)
    for other in range(int(os.environ["SLURM_STEP_NUM_TASKS"])):
        path = Path(f"at.{attempt}.{other}")
        while not asked and not (path.exists() and int(path.read_text()) >= step):
            time.sleep(0.01)


def save(rank: int, step: int) -> None:
    if rank == 0:
        Path(f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)


def write(name: str, content: object) -> None:
    temporary = Path(f".{name}.tmp")
    temporary.write_text(str(content))
    temporary.rename(name)


if __name__ == "__main__":
    sys.exit(main())
