"""``potamos kernels``: whether the kernels are right, and how fast. Imports nothing heavy; see ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Test the kernels, and time them on a GPU.", no_args_is_help=True)

RESULTS = Path("benchmarks/results")


@app.command()
def check(
    only: Annotated[str, typer.Option(help="Compile only configurations with this in their name.")] = "",
    tests: Annotated[bool, typer.Option(help="Run the tests in Triton's interpreter first.")] = True,
    workers: Annotated[int | None, typer.Option(help="Processes that compile; one per core by default.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Where the table goes, as CSV.")] = RESULTS / "kernels_aot.csv",
) -> None:
    """Test the kernels in Triton's interpreter and compile them for Hopper and Ampere, without a GPU; some minutes.

    Exit status 1 where a test fails, a kernel spills registers, needs more shared memory than there is, or leaves the
    tensor cores unused.

    Example: potamos kernels check --only h3_mix
    """
    from potamos.kernels.check import check as run

    raise typer.Exit(run(only=only, tests=tests, workers=workers, out=out))


@app.command()
def bench(
    minutes: Annotated[float, typer.Option(help="End after so many, tests included.", min=1)] = 7.5,
    out: Annotated[Path, typer.Option(help="The folder that the CSV files go to.")] = RESULTS,
    profile: Annotated[bool, typer.Option("--profile", help="Say what limits the mixer instead.")] = False,
) -> None:
    """Test the kernels on this machine's GPU and, if they are right, time them; eight minutes.

    Example: potamos kernels bench --out results
    """
    from potamos.kernels import bench as module

    raise typer.Exit(module.profile() if profile else module.bench(minutes=minutes, out=out))
