"""The main job from nothing to a text: corpus, tokenizer, shards, training through a kill, scores, a sample.

Every part prints the command that does the same by hand. What is already there is used again.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from potamos.data.baselines import table_baselines, xz_bits_per_byte
from potamos.data.commands import prepare_dataset, summarize, train
from potamos.data.errors import DatasetError
from potamos.data.sources import documents, open_source
from potamos.data.tokenizer import Tokenizer, load_tokenizer
from potamos.files import write_atomically
from potamos.pretrain import show
from potamos.pretrain.checkpoint import step_folders
from potamos.pretrain.config import load_recipe, parse_recipe
from potamos.pretrain.evaluate import Score
from potamos.pretrain.generate import generate
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.runs import open_run, score_run
from potamos.slurm.run_folder import RunFolder

RECIPE, CORPUS = "h3_hybrid_tiny", "sotu"
PROMPT = "The state of the Union is"
POLL_SECONDS = 0.1


@dataclass
class Demo:
    """Where things are, what the recipe says, and how long each part took."""

    out: Path
    recipe: Recipe
    place: list[str]  # overrides that put the recipe's files below ``out``
    overrides: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Path:
        return Path(self.recipe.tokenizer.path)

    @property
    def training(self) -> Path:
        return Path(self.recipe.data.stages[0].sources[0].path)

    @property
    def validation(self) -> Path:
        return Path(self.recipe.data.validation[0].path)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.out / "run")

    @property
    def finished(self) -> bool:
        """Whether this very recipe has been trained to its end."""
        if not self.run.done.exists():
            return False
        return parse_recipe(self.run.recipe.read_text(encoding="utf-8"), str(self.run.recipe)) == self.recipe

    @contextmanager
    def part(self, title: str, command: Sequence[str] = ()) -> Iterator[None]:
        """Announce a part and the command for it, and take its time."""
        show.line(f"\n{len(self.seconds) + 1}. {title}", style="bold")
        if command:
            say_command(command)
        began = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - began


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of what the model must beat."""

    unigram: float
    bigram: float
    xz: float


def demo(out: Path, overrides: Sequence[str] = ()) -> int:
    """Run the demo in folder ``out``; ``overrides`` change its recipe. 0 where the model beats the bigram table."""
    began = time.perf_counter()
    place = [] if out == Path("demo") else paths_below(out)
    job = Demo(out, load_recipe(RECIPE, [*place, *overrides]), place, list(overrides))
    out.mkdir(parents=True, exist_ok=True)
    if job.finished:
        show.line(f"{out} holds a finished demo, which is used again. To start over: rm -r {out}")
    else:
        show.line(f"Everything goes into {out}. Each part prints the command that does the same by hand.")
    with ThreadPoolExecutor(1) as background:  # lzma lets other threads run
        cached = read_baselines(job)
        xz = None if cached else background.submit(xz_of_corpus)
        tokenizer = make_tokenizer(job)
        make_datasets(job)
        baselines = cached or make_baselines(job, tokenizer, xz)
    code = train_through_a_kill(job)
    if code != 0 or not job.finished:
        show.line(f"training ended early, with exit status {code}")
        return code or 1
    score = evaluate_and_write(job)
    draw(job)
    return summarize_all(job, score, baselines, time.perf_counter() - began)


def paths_below(out: Path) -> list[str]:
    """Overrides that move the recipe's files into another folder."""
    return [
        f"tokenizer.path={_quoted(out / 'tokenizer.json')}",
        f"data.stages.0.mixture.0.path={_quoted(out / 'train')}",
        f"data.validation.0.path={_quoted(out / 'validation')}",
    ]


def _quoted(path: Path) -> str:
    """The path, as YAML text where it has to be: overrides follow YAML's rules, in which `#` and `:` mean much."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]+", text) else json.dumps(text)


def say_command(command: Sequence[str]) -> None:
    show.line("$ " + shlex.join(command), style="cyan")


# --- data --------------------------------------------------------------------------------------------------------


def make_tokenizer(job: Demo) -> Tokenizer:
    """A tokenizer of the recipe's size, from the training split alone."""
    vocabulary = job.recipe.model.frontend.vocabulary  # pyright: ignore[reportAttributeAccessIssue]
    command = ["potamos", "data", "tokenizer", CORPUS, str(job.tokenizer), f"--vocabulary={vocabulary}"]
    with job.part("tokenizer", [*command, "--split=train"]):
        if job.tokenizer.exists():
            show.line(f"{job.tokenizer} is there already")
            return load_tokenizer("json", job.tokenizer)
        tokenizer, summary = train(CORPUS, vocabulary, job.tokenizer, split="train")
        show.tokenizer(summary)
        return tokenizer


def make_datasets(job: Demo) -> None:
    """Token shards of both splits: a year in twenty is held out."""
    for path, split in ((job.training, "train"), (job.validation, "validation")):
        command = ["potamos", "data", "prepare", CORPUS, str(path), f"--tokenizer={job.tokenizer}", f"--split={split}"]
        with job.part(f"{split} data", command):
            if path.exists():
                show.line(f"{path} is there already")
                show.dataset(summarize(path))
            else:
                show.dataset(prepare_dataset(CORPUS, path, tokenizer_path=job.tokenizer, split=split))


def xz_of_corpus() -> float:
    return xz_bits_per_byte(document.text for document in documents(open_source(CORPUS, "all")))


def make_baselines(job: Demo, tokenizer: Tokenizer, xz: Future[float] | None) -> Baselines:
    """What a model must beat, on the same held-out tokens; xz gets the whole corpus, training text included."""
    assert xz is not None
    with job.part("baselines"):
        tables = table_baselines(job.training, job.validation, tokenizer)
        found = Baselines(tables.unigram, tables.bigram, xz.result())
        content = {"data": _fingerprints(job), **vars(found)}
        write_atomically(_baselines_path(job), json.dumps(content, indent=1).encode() + b"\n")
        show.line(
            f"bits per byte: bigram table {found.bigram:.3f}, unigram table {found.unigram:.3f}, xz -9e {found.xz:.3f}"
        )
        return found


def read_baselines(job: Demo) -> Baselines | None:
    """Those of an earlier demo, if they belong to the same data."""
    try:
        content = json.loads(_baselines_path(job).read_bytes())
        if content.pop("data") == _fingerprints(job):
            return Baselines(**content)
    except (OSError, ValueError, KeyError, TypeError, DatasetError):
        pass
    return None


def _baselines_path(job: Demo) -> Path:
    return job.out / "baselines.json"


def _fingerprints(job: Demo) -> list[str]:
    return [summarize(path).fingerprint for path in (job.training, job.validation)]


# --- training ----------------------------------------------------------------------------------------------------


def train_through_a_kill(job: Demo) -> int:
    """Train as a program of its own, kill it without warning on the way, and start it again; its exit status."""
    arguments = ["train", RECIPE, *job.place, *job.overrides, "--run", str(job.run.path)]
    with job.part("training", ["potamos", *arguments]):
        if job.finished:
            show.line(f"{job.run.path} is trained already")
            return 0
        if not step_folders(job.run.checkpoints):
            process = subprocess.Popen([*program(), *arguments])
            killed_at = kill_on_the_way(process, job)
            if killed_at is None:
                return _wait(process)
            saved = max(step_folders(job.run.checkpoints))
            show.line(
                f"\nkilled (SIGKILL) at step {killed_at}. The newest checkpoint is that of step {saved}; "
                "the same command goes on from it:",
                style="bold red",
            )
            say_command(["potamos", *arguments])
        else:
            show.line("an earlier demo began this run; it goes on")
        return _wait(subprocess.Popen([*program(), *arguments]))


def program() -> list[str]:
    """How to start potamos: its console script, or the same function where that is not installed."""
    script = Path(sysconfig.get_path("scripts")) / "potamos"
    return [str(script)] if script.exists() else [sys.executable, "-c", "from potamos.pretrain.cli import main; main()"]


def kill_on_the_way(process: subprocess.Popen[bytes], job: Demo) -> int | None:
    """SIGKILL the process soon after a save, about a third of the way; the step it stood at, None if it ended before.

    Soon after a save, so that a demo loses seconds and not minutes; what a kill costs does not depend on it otherwise.
    """
    third = job.recipe.train.steps / 3
    try:
        while process.poll() is None:
            saved = max(step_folders(job.run.checkpoints), default=0)
            step = _step(job.run)
            if step > saved >= third:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return step
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:  # the process got it too, and saves
        process.wait()
    return None


def _step(run: RunFolder) -> int:
    try:
        return int(json.loads(run.state.read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:  # the process got it too, and saves
            continue


# --- results -----------------------------------------------------------------------------------------------------


def evaluate_and_write(job: Demo) -> Score:
    """Score all of the held-out text, and let the model continue a prompt."""
    run = str(job.run.path)
    with job.part("evaluation", ["potamos", "evaluate", run]):
        opened = open_run(run, device=job.recipe.train.device)
        scores = score_run(opened)
        show.scores(scores)
    command = ["potamos", "generate", run, "--prompt", PROMPT, "--tokens=120", "--temperature=0.8", "--top-p=0.95"]
    with job.part("sample", command):
        boundaries = opened.recipe.data.boundaries
        pieces = generate(
            opened.model, opened.tokenizer, PROMPT, tokens=120, temperature=0.8, top_p=0.95, boundaries=boundaries
        )
        show.stream(PROMPT, pieces)
    return next(iter(scores.values()))


def draw(job: Demo) -> None:
    """The loss curve as a picture, where matplotlib is installed."""
    from potamos.pretrain.plot import plot_loss

    picture = job.run.path / "loss.png"
    try:
        plot_loss(job.run, picture, title=job.recipe.name)
        show.line(f"\nloss curve: {picture}")
    except ImportError as error:
        show.line(f"\nno picture of the loss: {error}")


def summarize_all(job: Demo, score: Score, baselines: Baselines, total: float) -> int:
    """The table of figures, the times, what to do next; the exit status."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("held-out text")
    table.add_column("bits per byte", justify="right")
    table.add_row(job.recipe.name, f"{score.bits_per_byte:.3f}", style="bold green")
    table.add_row("bigram table, interpolated", f"{baselines.bigram:.3f}")
    table.add_row("xz -9e, whole corpus", f"{baselines.xz:.3f}")
    table.add_row("unigram table", f"{baselines.unigram:.3f}")
    show.line("")
    show.out.print(table)
    times = ", ".join(f"{title} {seconds:.0f}" for title, seconds in job.seconds.items())
    show.line(f"\nseconds: {times}; in all {total:.0f}")
    show.line("\nwatch it:   tensorboard --logdir " + shlex.quote(os.fspath(job.run.tensorboard)))
    show.line(f"let it go on:   potamos generate {job.run.path} --prompt 'My fellow citizens' --seed 1")
    show.line("compare with attention alone:   " + shlex.join(["potamos", "train", "gpt_tiny", *job.place]))
    show.line("every recipe:   potamos recipes")
    if not score.bits_per_byte < baselines.bigram:
        show.error(
            f"the model's {score.bits_per_byte:.3f} bits per byte do not beat the bigram's {baselines.bigram:.3f}; "
            "train longer, in another folder: potamos demo --out longer train.steps=1200 schedule.decay=1200"
        )
        return 1
    return 0
