"""What commands print: tables of recipes, scores and datasets. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from potamos.data.bench import BenchReport
    from potamos.data.commands import DatasetSummary, Excerpt, LeftOut, Share, TokenizerSummary, VerifyReport
    from potamos.data.manifest import Manifest
    from potamos.data.passages import PassageSummary
    from potamos.pretrain.catalog import Entry
    from potamos.pretrain.evaluate import Score
    from potamos.pretrain.plan import Plan

# A file or a pipe gets lines as long as they are.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(highlight=False, stderr=True)


def error(message: str) -> None:
    """One red message on standard error, its lines unbroken so that file:line stays whole."""
    err.print(Text("error: " + message.replace("\n", "\n       "), style="red"), soft_wrap=True)


def note(message: str) -> None:
    """A side remark on standard error, out of the way of what a command gives out."""
    err.print(Text(message, style="dim"), soft_wrap=True)


def line(message: str, style: str = "") -> None:
    """A line on standard output as it is."""
    out.print(Text(message, style=style), soft_wrap=True)


def stream(prompt: str, pieces: Iterable[str]) -> None:
    """A prompt and the text after it, each piece as soon as it is there."""
    out.out(prompt, style="bold", end="", highlight=False)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # also where Ctrl-C ends it
        sys.stdout.write("\n")


def recipes(entries: Iterable[Entry]) -> None:
    table = _table("recipe", "family", right=("parameters",), last="description")
    for entry in entries:
        table.add_row(entry.name, entry.family, f"{entry.parameters:,}", entry.description)
    out.print(table)


def scores(found: Mapping[str, Score]) -> None:
    table = _table("data", right=("bits/byte", "perplexity", "loss", "targets"))
    for name, score in found.items():
        table.add_row(
            name, f"{score.bits_per_byte:.4f}", f"{score.perplexity:.2f}", f"{score.loss:.4f}", f"{score.targets:,}"
        )
    out.print(table)


def tokenizer(summary: TokenizerSummary) -> None:
    line(
        f"{summary.path}: {summary.vocabulary:,} ids from {summary.documents:,} documents, "
        f"{summary.text_bytes:,} bytes (sha256 {summary.sha256[:12]})"
    )


def dataset(summary: DatasetSummary) -> None:
    line(
        f"{summary.path}: {summary.tokens:,} tokens of {summary.documents:,} documents in {summary.shards} shards, "
        f"{summary.bytes_per_token:.2f} bytes a token"
    )


def datasets(made: Sequence[DatasetSummary]) -> None:
    for summary in made:
        dataset(summary)


def left_out(found: LeftOut) -> None:
    """What did not become part of a dataset; nothing where all did."""
    what = {
        "blank documents": found.blank,
        "duplicates": found.duplicates,
        f"bad records, listed in {found.rejects}": found.rejected,
    }
    if counts := [f"{count:,} {name}" for name, count in what.items() if count]:
        line(f"left out: {', '.join(counts)}")


def share(done: Share) -> None:
    """What is left to do where a `prepare` process was one of several, or had nothing to do."""
    if done.kept:
        note(f"{done.out} is there already, and equal")
    elif done.world > 1:
        line(
            f"{done.out}: process {done.rank} of {done.world} has done its {done.inputs} of {done.inputs_total} "
            f"inputs; when all have, run: potamos data finalize {shlex.quote(str(done.out))}"
        )


def indexed(manifest: Manifest) -> None:
    """A dataset made of foreign tars."""
    what = "text" if manifest.layout == "text" else f"{manifest.tokens:,} tokens of {manifest.documents:,} documents"
    line(f"indexed {len(manifest.shards)} tars: {what}")


def dataset_details(summary: DatasetSummary) -> None:
    table = Table.grid(padding=(0, 2))
    rows = {
        "source": ", ".join(f"{key} {value}" for key, value in summary.source.items()),
        "tokenizer": f"{summary.tokenizer['kind']}, {summary.tokenizer['vocabulary']:,} ids, "
        f"sha256 {str(summary.tokenizer['sha256'])[:12]}",
        "documents": f"{summary.documents:,} ({summary.blank:,} blank left out, {summary.rejected:,} rejected, "
        f"{summary.mended:,} mended, "
        + (f"{summary.duplicates:,} duplicates left out)" if summary.deduplicated else "duplicates not looked for)"),
        "tokens": f"{summary.tokens:,} ({summary.bytes_per_token:.2f} bytes each)",
        "text": f"{summary.text_bytes:,} bytes",
        "shards": f"{summary.shards} ({summary.chunks} chunks of {summary.chunk_tokens:,} tokens), from "
        f"{summary.parts} inputs",
        "fingerprint": summary.fingerprint,
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    line(str(summary.path), style="bold")
    out.print(table)


def excerpts(found: Iterable[Excerpt]) -> None:
    for excerpt in found:
        begin, end = "begins" if excerpt.begins else "goes on", "ends" if excerpt.ends else "goes on after this"
        line(f"document {excerpt.document} ({begin} here, {end}), {len(excerpt.tokens)} tokens", style="dim")
        line(excerpt.text)


def verification(report: VerifyReport) -> None:
    for problem in report.problems:
        error(problem)
    if report.ok:
        depth = "every byte" if report.deep else "sizes and indexes; --deep reads every byte"
        line(
            f"{report.path}: sound ({report.shards} shards, {report.chunks} chunks, {report.tokens:,} tokens; {depth})"
        )


def plan(found: Plan) -> None:
    """What a run will read: a row for each source of each stage, totals, validation sets, and what to know of them."""
    table = _table("stage", "source", right=("share", "samples", "tokens", "epochs", "rows an epoch", "unread tokens"))
    for source in found.sources:
        epochs = f"{source.epochs:.3f}"
        if source.epochs and source.epochs_before + source.epochs > 1:
            epochs += " repeats"
        table.add_row(
            f"{source.stage} from {found.starts[source.stage]:,}",
            source.name,
            f"{100 * source.share:.2f} %",
            f"{source.samples:,}",
            f"{source.tokens:,}",
            epochs,
            f"{source.samples_per_epoch:,}",
            f"{source.unread_tokens:,}",
        )
    table.add_row("in all", "", "", f"{found.samples:,}", f"{found.tokens:,}", style="bold")
    line(f"{found.name}: {found.steps:,} steps of {found.sequences:,} rows of {found.sequence_length:,} tokens", "bold")
    out.print(table)
    if found.end > found.samples:
        line(f"data.skip leaves out {found.end - found.samples:,} samples; the run ends at sample {found.end:,}")
    for held_out in found.validation:
        line(
            f"validation {held_out.name}: {held_out.tokens:,} tokens, {held_out.scored:,} of {held_out.windows:,} "
            f"windows scored each time"
        )
    for notice in found.notices:
        line(notice, style="yellow")


def bench(report: BenchReport) -> None:
    """The medians, with the least and the most that was measured."""
    table = _table("measured", right=("median", "from", "to"), last="unit")
    for row in report.rows:
        figures = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (row.median, row.lowest, row.highest))
        table.add_row(row.name, *figures, row.unit)
    line(f"{report.path or 'random tokens'}: {report.tokens:,} tokens a round", "bold")
    out.print(table)


def passages(summary: PassageSummary) -> None:
    line(
        f"{summary.path}: {summary.passages:,} passages of {summary.documents:,} documents, {summary.words:,} words; "
        f"{summary.short:,} too short"
    )


def _table(*names: str, right: tuple[str, ...] = (), last: str | None = None) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last, no_wrap=True)  # cut short on a narrow terminal: one line each
    return table
