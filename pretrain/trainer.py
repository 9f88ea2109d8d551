"""The trainer: ``fit`` is the run, ``train_step`` is a step. Both read from top to bottom and know interfaces only.

What makes a resume exact is that there is nothing else to restore: rows are a function of the global sample index,
random choices of (seed, step, sample, place), and every tensor that a step changes is in the checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from potamos.data.loader import Loader, Rows
from potamos.parallel import launch
from potamos.parallel.apply import apply
from potamos.parallel.mesh import sizes
from potamos.parallel.watchdog import Watchdog
from potamos.pretrain import carried, opening, resume, setup
from potamos.pretrain.agreement import Reader, check_same_data
from potamos.pretrain.checkpoint import Checkpoints, Loaded, Snapshot
from potamos.pretrain.config import Change, to_yaml
from potamos.pretrain.evaluate import score
from potamos.pretrain.generate import GenerationError, generate
from potamos.pretrain.guard import Stop, stop_requested, write_done, write_stop
from potamos.pretrain.models.interfaces import State
from potamos.pretrain.objectives.base import Batch, System, Terms
from potamos.pretrain.optim import GradientNorm, Optimizer, schedule_factor
from potamos.pretrain.recipe import Recipe
from potamos.pretrain.spikes import SpikeGuard
from potamos.pretrain.throughput import memory_bytes, peak_flops
from potamos.slurm.run_folder import RunFolder

logger = logging.getLogger(__name__)


def train(recipe: Recipe, run: Path) -> int:
    """Train in folder ``run``, going on from its newest checkpoint if it has one; the exit status for the shell."""
    place = launch.Rank.from_environment()
    watchdog = Watchdog(RunFolder.of(run).logs, place.rank, place.world, seconds=recipe.telemetry.watchdog)
    with watchdog.starting("meeting the other ranks"):
        rank = launch.start(setup.pick_device(recipe.train.device).type)
    try:
        trainer = Trainer(recipe, run, rank, watchdog)
        try:
            return trainer.fit()
        except BaseException as error:  # also a second Ctrl-C: readers of state.json shall know that it ended
            trainer.telemetry.close(f"failed: {type(error).__name__}")
            raise
        finally:
            trainer.stream.close()
    finally:
        launch.stop()


@dataclass(frozen=True)
class StepResult:
    """What a step tells: tensors still on the device, and what the host knew before."""

    loss: Tensor
    terms: dict[str, Tensor]
    norm: Tensor
    norms: Tensor
    refused: Tensor
    tokens_per_byte: float


class Trainer:
    """Everything of one run on one rank. Building it validates everything that can be before the first step."""

    def __init__(self, recipe: Recipe, run: Path, rank: launch.Rank, watchdog: Watchdog | None = None) -> None:
        self.recipe, self.rank, self.folder = recipe, rank, RunFolder.of(run)
        self.watchdog = watchdog or Watchdog(self.folder.logs, rank.rank, rank.world, seconds=recipe.telemetry.watchdog)
        self.step = self.next_sample = 0
        self.reader: Reader | None = None
        self.changes: list[Change] = []
        with self.watchdog.starting("opening the data"):
            draft = self._open()
            self.watchdog.beat("building the model")
            self._build(draft)
            self.watchdog.beat("looking for a checkpoint")
            self._go_on()
            self.watchdog.beat("opening the records")
            self._tell()
        self.window = Window(began=time.perf_counter())

    def _open(self) -> System:
        """The device and the data; what can be refused is refused here. Returns a draft of the model."""
        recipe, rank = self.recipe, self.rank
        self.device = setup.pick_device(recipe.train.device, rank.local_rank)
        if self.device.type == "cpu":
            setup.keep_freed_memory()
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        draft = setup.draft_system(recipe)
        self.sizes = sizes(recipe.parallel.layout(), rank.world)
        self.micro_batches = opening.check_spread(recipe, draft, self.sizes)
        self.tokenizer = launch.together(lambda: setup.open_tokenizer(recipe))
        self.token_bytes = self.tokenizer.token_bytes()
        self.stream = launch.together(lambda: setup.open_stream(recipe, self.tokenizer))
        self.validation = launch.together(lambda: setup.open_validation(recipe, self.tokenizer))
        check_same_data(self.stream, self.validation)
        return draft

    def _build(self, draft: System) -> None:
        """The model spread over the ranks, and what belongs to its parameters."""
        recipe, rank = self.recipe, self.rank
        self.flops_per_token = 3.0 * draft.model.flops_per_token(recipe.data.sequence_length)
        dtype = setup.DTYPES[recipe.train.precision]
        self.spread = apply(
            draft,
            recipe.parallel.layout(),
            rank.rank,
            rank.world,
            self.device,
            setup.filler(recipe, self.device),
            None if dtype == torch.float32 else dtype,
            recipe.data.sequence_length,
        )
        self.system = self.spread.system
        self.model, self.objective = self.system.model, self.system.objective
        self.parameters = self.spread.stored
        self.norm = GradientNorm(self.spread.gradients, self.spread.table)
        self.optimizer = Optimizer(self.parameters, self.spread.table, recipe.optimizer, self.spread.matrices)
        self.guard = SpikeGuard(recipe.optimizer.window, recipe.optimizer.spike, self.device)
        self.carries = recipe.data.order == "contiguous"
        self.carried: list[State] = [None] * self.micro_batches

    def _go_on(self) -> None:
        """Take the folder, and become what its newest checkpoint was, if there is one."""
        recipe, rank = self.recipe, self.rank
        self.lock = launch.on_main(lambda: resume.hold(self.folder))
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            keep=recipe.checkpoint.keep,
            keep_every=recipe.checkpoint.keep_every,
            main=rank.is_main,
            together=launch.together,
        )
        loaded = resume.newest(self.checkpoints, rank)
        if loaded is not None:
            self.watchdog.beat(f"restoring the checkpoint of step {loaded.step}")
            self.restore(loaded)

    def _tell(self) -> None:
        """What telemetry begins with."""
        recipe, rank = self.recipe, self.rank
        self.peak = peak_flops(self.device, setup.DTYPES[recipe.train.precision])
        self.predicted = opening.predicted_speed(recipe, rank.world, self.device) if rank.is_main else None
        self.telemetry = opening.open_telemetry(
            recipe,
            self.folder,
            rank,
            step=self.step,
            next_sample=self.next_sample,
            stream=self.stream,
            tokenizer=self.tokenizer,
            spread=self.spread,
            changes=self.changes,
        )

    # --- the run ---------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the recipe's last step, or until asked to stop; returns the exit status."""
        if self.step >= self.recipe.train.steps:
            return self._already_finished()
        with self.watchdog:
            return self._finish(self._train())

    def _train(self) -> Stop | None:
        """Every step that is left, the last one's save included; what stopped it before."""
        recipe, stop = self.recipe, None
        with Loader(
            self.stream,
            sequences=recipe.train.sequences,
            rank=self.spread.data_index,
            world=self.sizes.data,
            next_sample=self.next_sample,
            allow_repeat=recipe.data.allow_repeat,
        ) as loader:
            self.reader = Reader(loader, recipe.data.sequence_length)
            self.system.train()
            while self.step < recipe.train.steps and stop is None:
                self.watchdog.beat(f"step {self.step + 1}")
                result = self.train_step(self.reader.rows())
                self.step += 1
                first = int(self.stream.samples(self.next_sample, 1)[0])
                self.guard.record(self.step, first, loader.next_sample - 1, result.refused)
                self.next_sample = loader.next_sample
                self.observe(result, loader.data_wait)
                if self._due(recipe.validation.every):
                    self.validate()
                if self._due(recipe.telemetry.samples.every):
                    self.write_samples()
                stop = self.agreed_stop()
                last = stop is not None or self.step == recipe.train.steps
                if last or self._due(recipe.checkpoint.every):
                    self.save(wait=last)
        return stop

    def train_step(self, rows: Rows) -> StepResult:
        """One optimizer step on this rank's rows of a global batch. Nothing here waits for the device."""
        batches = self.prepare(rows)
        counts, text = self.total_counts(batches)

        def weigh(out: Terms) -> Tensor:
            return torch.stack([t.weight * (t.sum / counts[t.count]) for t in out.terms.values()]).sum()

        results = self.spread.run([batch.to(self.device) for batch in batches], self.carried, weigh, carry=self.carries)
        if self.carries:
            self.carried = [carried.detach(self.model.stack.segment_state(out.state)) for out in results]
        loss, terms = self._losses(results, counts, weigh)
        norm, norms = self.norm.measure()
        refused = 1.0 - self.guard.accept(norm, loss).to(torch.float32)
        self.norm.clip(norm, self.recipe.optimizer.clip)
        self.optimizer.step(schedule_factor(self.recipe.schedule, self.step, self.recipe.train.steps), refused)
        self.spread.zero_grad()
        return StepResult(
            loss=loss,
            terms=terms,
            norm=norm,
            norms=norms,
            refused=refused,
            tokens_per_byte=text,
        )

    def _losses(
        self, results: Sequence[Terms], counts: dict[str, float], weigh: Callable[[Terms], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The step's loss and each of its terms, of all ranks, on every rank."""
        names = self.spread.terms(results)
        sums = torch.zeros(1 + len(names), device=self.device)
        for out in results if self.spread.scores else ():
            terms = [out.terms[name].sum.detach() / counts[out.terms[name].count] for name in names]
            sums = sums + torch.stack([weigh(out).detach(), *terms])
        total = self.spread.total(sums)
        return total[0], dict(zip(names, total[1:], strict=True))

    def prepare(self, rows: Rows) -> list[Batch]:
        """This rank's rows as micro-batches, in order."""
        size = self.recipe.train.micro_sequences
        return [
            self.objective.prepare(
                rows.slice(begin, begin + size), seed=self.recipe.train.seed, step=self.step, carried=self.carries
            )
            for begin in range(0, len(rows), size)
        ]

    def total_counts(self, batches: list[Batch]) -> tuple[dict[str, float], float]:
        """Targets of each kind in the whole global batch, and its scored tokens per byte of text.

        Over micro-batches and ranks, before the first backward; host numbers, so no device is waited for. A rank whose
        rows could not be read says so in the same sum, and all of them raise.
        """
        names = sorted({name for batch in batches for name in batch.counts})
        own = [sum(batch.counts.get(name, 0) for batch in batches) for name in names]
        own.append(sum(int((batch.scored >= 0).sum()) for batch in batches))
        own.append(sum(setup.scored_bytes(batch.scored, self.token_bytes) for batch in batches))
        failure = None if self.reader is None else self.reader.failure
        own.append(0 if failure is None else 1)
        # Ranks that share rows count them alike, and all counts are whole numbers: the quotient is exact.
        total = launch.all_sum(torch.tensor(own, dtype=torch.float64)) / (self.rank.world // self.sizes.data)
        *totals, scored, text_bytes, failed = total.tolist()
        if failed:
            launch.fail_together(failure)
        return {name: max(1.0, count) for name, count in zip(names, totals, strict=True)}, scored / max(1.0, text_bytes)

    # --- looking ---------------------------------------------------------------------------------------------------

    def observe(self, result: StepResult, data_wait: float) -> None:
        """Remember what the step told; write it down every ``telemetry.every`` steps, the only place that waits."""
        window = self.window
        window.steps += 1
        if not (self._due(self.recipe.telemetry.every) or self.step == self.recipe.train.steps):
            return
        # With several terms, likelihood is that of the objective's own one.
        nll = result.terms.get(self.objective.options.kind, result.loss)
        values = torch.stack(
            [result.loss, nll, result.norm, self.guard.skipped.to(result.loss), *result.norms, *result.terms.values()]
        ).tolist()
        (loss, nats, norm, skipped), kinds = values[:4], values[4 : 4 + len(self.norm.kinds)]
        self._tell_skipped()
        now = time.perf_counter()
        seconds = now - window.began
        tokens = window.steps * self.recipe.train.sequences * self.recipe.data.sequence_length
        factor = schedule_factor(self.recipe.schedule, self.step - 1, self.recipe.train.steps)
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(nats, 700.0)),
            "bits_per_byte": nats / math.log(2) * result.tokens_per_byte,
            "learning_rate": self.recipe.optimizer.lr * factor,
            "gradient_norm/total": norm,
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops_per_token * tokens / seconds / (self.peak * self.rank.world),
            "data_wait": (data_wait - window.data_wait) / seconds,
            "memory_bytes": float(memory_bytes(self.device)),
            "skipped_steps": skipped,
        }
        if self.predicted is not None:
            metrics["plan/predicted_tokens_per_second"] = self.predicted
        metrics |= {f"gradient_norm/{kind}": value for kind, value in zip(self.norm.kinds, kinds, strict=True)}
        metrics |= {f"loss/{name}": value for name, value in zip(result.terms, values[4 + len(kinds) :], strict=True)}
        self.telemetry.log(self.step, metrics, next_sample=self.next_sample, save_failed=self.checkpoints.failed)
        self.window = Window(began=now, data_wait=data_wait)

    def _tell_skipped(self) -> None:
        for step in self.guard.report():
            self.telemetry.note(
                f"step {step.step} skipped: samples {step.first} to {step.last} (to leave them out when going on from "
                f"an earlier checkpoint, add to data.skip: [{step.first}, {step.last + 1}])"
            )

    def validate(self) -> None:
        """Score every held-out dataset and write the result down."""
        began = time.perf_counter()
        for held_out in self.validation:
            result = score(
                self.system,
                held_out.windows,
                self.token_bytes,
                device=self.device,
                rows_per_batch=self.recipe.train.micro_sequences,
                limit=self.recipe.validation.sequences,
                seed=self.recipe.train.seed,
                spread=self.spread,
                progress=partial(self.watchdog.beat, f"validation on {held_out.name} after step {self.step}"),
            )
            self.telemetry.validation(
                self.step,
                {
                    f"{held_out.name}/loss": result.loss,
                    f"{held_out.name}/perplexity": result.perplexity,
                    f"{held_out.name}/bits_per_byte": result.bits_per_byte,
                },
                next_sample=self.next_sample,
            )
        self.window.began += time.perf_counter() - began  # throughput is that of training

    def write_samples(self) -> None:
        """Continue the recipe's prompts and write the text down."""
        self.watchdog.beat(f"samples after step {self.step}")
        began = time.perf_counter()
        samples = self.recipe.telemetry.samples

        def write() -> None:
            try:
                for number, prompt in enumerate(samples.prompts):
                    self.telemetry.text(f"sample/{number}", self.step, prompt + "".join(self._continue(prompt)))
            except GenerationError as error:  # a sample is not worth a run
                self.telemetry.note(f"no sample: {error}")

        if self.sizes.dp_replicate == self.rank.world and self.model.causal:
            launch.on_main(write)
        self.window.began += time.perf_counter() - began

    def _continue(self, prompt: str) -> Iterator[str]:
        return generate(
            self.model,
            self.tokenizer,
            prompt,
            tokens=self.recipe.telemetry.samples.tokens,
            temperature=0.8,
            top_k=50,
            seed=self.step,
            boundaries=self.recipe.data.boundaries,
        )

    # --- stopping and going on -------------------------------------------------------------------------------------

    def agreed_stop(self) -> Stop | None:
        """A stop that any rank was asked for, so that all ranks save the same step."""
        self.watchdog.beat(f"agreeing whether to stop after step {self.step}")
        own = stop_requested()
        code = int(launch.all_max(torch.tensor(0 if own is None else 1 + own.exit_code)).item())
        return None if code == 0 else own or Stop("another rank was asked to stop", code - 1)

    def save(self, *, wait: bool) -> None:
        """Hand the state of this step to the checkpoint writer; with ``wait``, until it is on the disk."""
        self.watchdog.beat(f"collecting the checkpoint of step {self.step}")
        self._tell_skipped()  # those before a checkpoint are not trained again, so this is the last chance to name them
        snapshot = Snapshot(
            step=self.step,
            next_sample=self.next_sample,
            model=self.spread.gathered({name: p.detach() for name, p in self.parameters.items()}, lambda name: name),
            optimizer=self.spread.gathered(self.optimizer.state_tensors(), lambda name: name.rpartition(".")[0])
            | {resume.GUARD + name: t for name, t in self.guard.state_tensors().items()},
            carried=carried.gather(self.carried, self.rank) if self.carries else {},
            trainer={"data": self.stream.state_dict(self.next_sample), "tokenizer": self.tokenizer.sha256},
            recipe=to_yaml(self.recipe),
        )
        self.watchdog.beat(f"writing the checkpoint of step {self.step}")
        self.checkpoints.save(snapshot, wait=wait)

    def restore(self, loaded: Loaded) -> None:
        """Become what ``loaded`` was; refuses a recipe or data that would not continue it. Every rank must call it."""
        # All have read before any goes on: the forward below gathers sharded parameters, and waits for every rank.
        rows = launch.together(lambda: self._read(loaded))
        example = None if rows is None else self._example_state(rows)
        self.carried = launch.together(
            lambda: carried.scatter(loaded.carried, lambda: example, self.micro_batches, self.rank, self.device)
        )

    def _read(self, loaded: Loaded) -> Rows | None:
        """This rank's part of ``loaded``; rows for an example of the state that it carries, if it carries any."""
        self.changes = resume.check_recipe(loaded, self.recipe, self.folder.path)
        resume.check_data(loaded, self.stream)
        resume.check_parameters(self.spread.shapes, loaded.model, loaded.path)
        resume.read_parameters(self.spread, loaded.model)
        self.optimizer.load_tensors(resume.OwnMoments(self.spread, loaded.optimizer))
        self.guard.load_tensors(resume.guard_state(loaded.optimizer))
        self.step, self.next_sample = loaded.step, loaded.next_sample
        if not loaded.carried:
            return None
        return self.stream.rows(np.arange(self.recipe.train.micro_sequences))  # leaves what is read ahead alone

    @torch.no_grad()
    def _example_state(self, rows: Rows) -> State:
        batch = self.objective.prepare(rows, seed=0, step=0, carried=True).to(self.device)
        return self.model.stack.segment_state(self.system(batch).state)

    def _finish(self, stop: Stop | None) -> int:
        if stop is None and self.step % self.recipe.validation.every:
            self.validate()
        self.watchdog.beat("the end of the run")
        launch.together(self.checkpoints.wait)
        attempt, place = self.telemetry.attempt, {"step": self.step, "next_sample": self.next_sample}
        if stop is None:
            launch.on_main(lambda: write_done(self.folder.path, **place))
        else:
            launch.on_main(lambda: write_stop(self.folder.path, attempt, stop, **place))
        self.telemetry.close("finished" if stop is None else stop.reason)
        return 0 if stop is None else stop.exit_code

    def _already_finished(self) -> int:

        def mark() -> None:
            if not self.folder.done.exists():
                write_done(self.folder.path, step=self.step, next_sample=self.next_sample)

        launch.on_main(mark)
        wanted = self.recipe.train.steps
        self.telemetry.note(f"nothing to do: {self.step} steps are trained, train.steps is {wanted}; raise it to go on")
        self.telemetry.close("finished")
        return 0

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0


@dataclass
class Window:
    """What has gathered since the last log line."""

    began: float
    data_wait: float = 0.0
    steps: int = 0
