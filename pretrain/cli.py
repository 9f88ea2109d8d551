"""Every command: parse, call one function, print.

Nothing heavy is imported at the top. `potamos --help` must answer at once, and `train` has to install its signal
handlers before torch is imported, so commands import what they call.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from potamos.pretrain import (
    cli_cluster,
    cli_data,
    cli_evaluate,
    cli_kernels,
    cli_plan,
    cli_runs,
    cli_submit,
    cli_verify,
    show,
)
from potamos.pretrain.arguments import Device, Overrides, RecipeName, RunPath, Step

TRACEBACK = "POTAMOS_TRACEBACK"
CLUSTER = "On a Slurm cluster"

app = typer.Typer(
    name="potamos",
    help="Train language models that are not plain Transformers. Begin with: potamos demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipe_app = typer.Typer(help="Look at one recipe.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_kernels.app, name="kernels")
app.add_typer(cli_cluster.app, name="cluster", rich_help_panel=CLUSTER)
app.command(rich_help_panel=CLUSTER)(cli_submit.submit)
app.command(rich_help_panel=CLUSTER)(cli_runs.sweep)
app.command(rich_help_panel=CLUSTER)(cli_runs.status)
app.command(rich_help_panel=CLUSTER)(cli_runs.logs)
app.command(rich_help_panel=CLUSTER)(cli_runs.cancel)
app.command(rich_help_panel=CLUSTER)(cli_runs.requeue)
app.command(rich_help_panel=CLUSTER)(cli_runs.board)
app.command(rich_help_panel=CLUSTER)(cli_runs.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from potamos import __version__

        typer.echo(f"potamos {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
) -> None:
    """Train a model, or go on where its run folder stopped.

    Ctrl-C finishes the step, saves and exits with 130; the same command goes on from there.

    Example: potamos train h3_hybrid_tiny train.steps=200 --run runs/trial

    On several processes: potamos train h3_hybrid_tiny parallel.tp=2 --nproc 4. Under srun, or torchrun (mind the --):
    torchrun --no-python --nproc-per-node 2 -- potamos train h3_hybrid_tiny
    """
    if nproc > 1:
        raise typer.Exit(_train_on(nproc, recipe, overrides or [], run))
    from potamos.pretrain.guard import ignore_signals, install_signal_handlers, leaving

    install_signal_handlers()
    from potamos.pretrain.config import load_recipe
    from potamos.pretrain.trainer import train as run_training

    loaded = load_recipe(recipe, overrides or [])
    try:
        status = run_training(loaded, run or Path("runs") / loaded.name)
    except Exception:  # after a second Ctrl-C, what a library made of it, or met because of it
        if leaving():
            raise KeyboardInterrupt from None
        raise
    finally:
        ignore_signals()
    raise typer.Exit(status)


def _train_on(nproc: int, recipe: str, overrides: list[str], run: Path | None) -> int:
    """The same command in `nproc` processes; its exit status."""
    from potamos.parallel.mesh import sizes
    from potamos.parallel.processes import run_processes
    from potamos.pretrain.config import load_recipe
    from potamos.slurm.run_folder import RunFolder

    if "RANK" in os.environ:
        raise ValueError("--nproc starts processes by itself: leave it out under torchrun, or torchrun out")
    loaded = load_recipe(recipe, overrides)
    sizes(loaded.parallel.layout(), nproc)  # what is wrong is said once
    command = [sys.executable, "-m", "potamos.pretrain.cli", "train", recipe, *overrides]
    logs = RunFolder.of(run or Path("runs") / loaded.name).logs
    return run_processes([*command, *(["--run", str(run)] if run is not None else [])], nproc, logs=logs)


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="The text to continue; none begins a new document.")] = "",
    tokens: Annotated[int, typer.Option(help="Write at most this many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="Below 1 is safer, above 1 wilder, 0 always the likeliest.")] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Choose among so many of the likeliest tokens only; all by default.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest that have this share of the probability, 0 to 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    past_end: Annotated[bool, typer.Option("--past-end", help="Go on with a new document where one ends.")] = False,
    step: Step = None,
    device: Device = "auto",
) -> None:
    """Let a trained model write.

    Example: potamos generate runs/h3_hybrid_tiny --prompt "My fellow citizens" --tokens 100 --seed 7
    """
    from potamos.pretrain.generate import generate as write
    from potamos.pretrain.runs import open_run

    opened = open_run(run, step=step, device=device)
    pieces = write(
        opened.model,
        opened.tokenizer,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_at_end=not past_end,
        boundaries=opened.recipe.data.boundaries,
    )
    show.stream(prompt, pieces)


app.command()(cli_evaluate.evaluate)


@app.command()
def weights(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    step: Step = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Write a checkpoint's parameters into one safetensors file, whatever layout trained them.

    Example: potamos weights runs/h3_hybrid_tiny --out h3_hybrid_tiny.safetensors --dtype bf16
    """
    from potamos.pretrain.weights import write_weights

    count = write_weights(run, out, step=step, dtype=dtype)
    show.note(f"{out}: {count:,} parameters in {dtype}")


@app.command()
def recipes() -> None:
    """List the packaged recipes with their families and sizes.

    Example: potamos recipes
    """
    from potamos.pretrain.catalog import catalog

    show.recipes(catalog())


@recipe_app.command("show")
def recipe_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with every default filled in and every change applied.

    Example: potamos recipe show h3_hybrid_125m train.sequences=64 > mine.yaml
    """
    from potamos.pretrain.config import load_recipe, to_yaml

    typer.echo(to_yaml(load_recipe(recipe, overrides or [])), nl=False)


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
) -> None:
    """Train a small hybrid on two centuries of speeches, kill it, resume it, and let it write; some minutes.

    Example: potamos demo --out demo
    """
    from potamos.pretrain.demo import demo as run_demo

    raise typer.Exit(run_demo(out, overrides or []))


app.command()(cli_plan.plan)
app.command()(cli_verify.verify)


# --- errors ------------------------------------------------------------------------------------------------------


def main() -> None:
    """The console script. A user's mistake ends in one message and exit status 2, a fault of ours in a traceback."""
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if rank == "0" else logging.ERROR)
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK) == "1" or not is_mistake(error):
            raise
        if rank == "0" or is_of_one_rank(error):
            show.error(describe(error) if rank == "0" else f"rank {rank}: {describe(error)}")
        sys.exit(2)


def is_mistake(error: ValueError | OSError) -> bool:
    """Whether an error speaks to the user: the system's (a missing file, a full disk), an error class of this program,
    or a ValueError that this program itself raised. A ValueError from inside a library is a fault of ours."""
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "potamos":
        return True
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(innermost.filename).resolve().is_relative_to(Path(__file__).resolve().parent.parent)
    return type(error) is ValueError and ours and "raise " in (innermost.line or "raise ")


def is_of_one_rank(error: ValueError | OSError) -> bool:
    """Whether other ranks may not have met this error, so that rank 0 cannot speak for this one."""
    return isinstance(error, OSError) or type(error).__name__ == "LaunchError"


def describe(error: ValueError | OSError) -> str:
    """The message, with the file and the reason in plain words where it is the operating system's."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    main()
