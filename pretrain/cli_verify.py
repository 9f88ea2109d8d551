"""``potamos verify``: whether a layout leaves the gradients as they are. Imports nothing heavy; see ``cli.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potamos.pretrain import show
from potamos.pretrain.arguments import RecipeName

if TYPE_CHECKING:
    from potamos.pretrain.verify import Certificate, Without

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="AXIS=SIZE",
        help="The layout, as in dp_shard=2 tp=2 schedule=zbv; the recipe's own by default. Settings with a dot change "
        "the recipe, as in model.residual_dropout=0.1.",
    ),
]


def verify(
    recipe: RecipeName,
    settings: Settings = None,
    dtype: Annotated[
        str, typer.Option(help="fp32 (gradients may differ by 1e-5, updates by 1e-3) or fp64 (1e-10, 1e-9).")
    ] = "fp32",
    every: Annotated[bool, typer.Option("--all", help="All layouts of up to --ranks ranks; a line each.")] = False,
    ranks: Annotated[int, typer.Option(help="The most ranks to start.", min=1)] = 8,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Width of the small model; by default, as all sizes, the least that will do.", min=1),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the small model.", min=1)] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of its rows.", min=1)] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Its vocabulary.", min=2)] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of its steps, about.", min=1)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the ranks of one layout may take.", min=1)] = 120.0,
) -> None:
    """Prove that a layout changes nothing: gradients, their norm, updates and losses against one process.

    A small copy of the recipe's model trains three steps on CPU ranks of this machine, each parameter compared. Exit
    status 1 where a comparison fails, or under --all a layout ends without one.

    Example: potamos verify h3_hybrid_125m dp_shard=2 tp=2 pp=2

    Every layout that the model allows: potamos verify h3_hybrid_125m --all --json certificates.json
    """
    from potamos.pretrain.config import load_recipe
    from potamos.pretrain.verify import Certificate, Reductions, precision, verify, verify_all, write_certificates
    from potamos.pretrain.verify_layouts import PLAIN, parse_layout, recipe_layout

    words = settings or []
    loaded = load_recipe(recipe, [word for word in words if "." in word.partition("=")[0]])
    axes = [word for word in words if "." not in word.partition("=")[0]]
    own = loaded.parallel.layout()
    sizes = {axis: getattr(PLAIN, axis) for axis in ("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep")}
    base = replace(own, **sizes) if axes or every else recipe_layout(own, ranks)
    layout = parse_layout(axes, base)
    reductions = Reductions(width=width, layers=layers, length=length, vocabulary=vocabulary, rows=rows)
    kind = precision(dtype)
    certificates: list[Certificate] = []
    without: list[Without] = []
    if every:
        for result in verify_all(loaded, layout, ranks=ranks, dtype=kind, reductions=reductions, timeout=timeout):
            if isinstance(result, Certificate):
                certificates.append(result)
                _line(result)
            else:
                without.append(result)
                _why(result)
    else:
        certificates.append(_one(partial(verify, loaded, layout, dtype=kind, reductions=reductions), timeout))
        _table(certificates[0])
    if json is not None:
        write_certificates(json, certificates, without)
    broken = any(one.possible for one in without)
    passed = bool(certificates) and not broken and all(certificate.passed for certificate in certificates)
    show.line(_verdict(certificates, without, passed), style="green" if passed else "bold red")
    raise typer.Exit(0 if passed else 1)


def _one(certify: Callable[..., Certificate], timeout: float) -> Certificate:
    """One certificate; ranks that do not end in time are no difference, and said in one message."""
    from potamos.parallel.local import RankTimeout
    from potamos.pretrain.verify import VerifyTimeout

    try:
        return certify(timeout=timeout)
    except RankTimeout as error:
        raise VerifyTimeout(
            f"{str(error).splitlines()[0]}: they wait for each other, or need longer than --timeout allows; "
            "POTAMOS_TRACEBACK=1 shows where each one was"
        ) from error


def _verdict(certificates: list[Certificate], without: list[Without], passed: bool) -> str:
    good = sum(certificate.passed for certificate in certificates)
    broken = sum(one.possible for one in without)
    seconds = sum(certificate.seconds for certificate in certificates)
    verdict = "PASS" if passed else "FAIL"
    if len(certificates) == 1 and not without:
        return f"{verdict}: {certificates[0].layout} in {seconds:.1f} s"
    ended = f"{broken} ended without a certificate, " if broken else ""
    counted = f"{good} of {len(certificates) + broken} layouts pass, {ended}{len(without) - broken} are not possible"
    return f"{verdict}: {counted}; {seconds:.0f} s"


def _why(without: Without) -> None:
    """A layout of which there is no certificate, in a line."""
    if without.possible:
        show.line(f"FAIL  {without.layout}: {without.why}", style="red")
    else:
        show.line(f"{without.layout}: not possible ({without.why})", style="dim")


def _line(certificate: Certificate) -> None:
    """One layout in a line, and what failed beneath it."""
    gradient, update = certificate.worst_gradient.gradient_error, certificate.worst_update.update_error
    show.line(
        f"{'pass' if certificate.passed else 'FAIL'}  {certificate.layout:<52}  gradient {gradient:.1e}  "
        f"update {update:.1e}  norm {certificate.norms.error:.1e}  loss {certificate.losses.error:.1e}  "
        f"{certificate.seconds:4.1f} s",
        style="" if certificate.passed else "red",
    )
    for failure in certificate.failures:
        show.line(f"      {failure}", style="red")


def _table(certificate: Certificate) -> None:
    """Every parameter of one layout."""
    from rich.table import Table

    for reduction in certificate.reductions:
        show.line(reduction, style="dim")
    table = Table(box=None, pad_edge=False)
    table.add_column("parameter", no_wrap=True)
    for name in ("gradient", "gradient error", "update error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for line in certificate.lines:
        verdict = "" if line.passed else f"FAIL {line.note or ''}".strip()
        table.add_row(
            line.name,
            f"{line.gradient_norm:.3e}",
            f"{line.gradient_error:.1e}",
            f"{line.update_error:.1e}" if line.exempt is None else "exempt",
            verdict,
            style="" if line.passed else "red",
        )
    show.out.print(table)
    for name, values in (
        ("norm before clipping", certificate.norms),
        ("loss", certificate.losses),
        ("score of held-out rows", certificate.scores),
    ):
        alone, spread = (", ".join(f"{value:.9g}" for value in found) for found in (values.alone, values.spread))
        mark = "" if values.passed else "FAIL  "
        show.line(f"{mark}{name}: alone {alone}; spread {spread}; error {values.error:.1e}")
    for reason in sorted({line.exempt for line in certificate.lines if line.exempt is not None}):
        names = ", ".join(line.name for line in certificate.lines if line.exempt == reason)
        show.line(f"exempt: {names}: {reason}", style="dim")
    for failure in certificate.failures:
        show.line(failure, style="red")
