"""Published mixtures: the weights under which well-known corpora were trained on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from potamos.data.errors import MixtureError
from potamos.data.fetch import shown
from potamos.data.manifest import MANIFEST
from potamos.data.remote import is_url
from potamos.data.stages import SourceSpec

# Gao et al. 2020, "The Pile: An 800GB Dataset of Diverse Text for Language Modeling" (arXiv 2101.00027), Table 1,
# column "Weight": percent of the text, repetitions counted. Names as in a document's `meta.pile_set_name`.
PILE = {
    "Pile-CC": 18.11,
    "PubMed Central": 14.40,
    "Books3": 12.07,
    "OpenWebText2": 10.01,
    "ArXiv": 8.96,
    "Github": 7.59,
    "FreeLaw": 6.12,
    "StackExchange": 5.13,
    "USPTO Backgrounds": 3.65,
    "PubMed Abstracts": 3.07,
    "Gutenberg (PG-19)": 2.17,
    "OpenSubtitles": 1.55,
    "Wikipedia (en)": 1.53,
    "DM Mathematics": 1.24,
    "Ubuntu IRC": 0.88,
    "BookCorpus2": 0.75,
    "EuroParl": 0.73,
    "HackerNews": 0.62,
    "YoutubeSubtitles": 0.60,
    "PhilPapers": 0.38,
    "NIH ExPorter": 0.30,
    "Enron Emails": 0.14,
}
PUBLISHED = {"pile": PILE}


def slug(name: str) -> str:
    """The folder of a subset: lower case, every run of other signs one hyphen.

    Example:
        ``slug("Wikipedia (en)") == "wikipedia-en"``
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def published(name: str, folder: str | os.PathLike[str]) -> tuple[tuple[SourceSpec, ...], tuple[str, ...]]:
    """The sources of a published mixture as far as they are prepared under ``folder``, and what must be told of it.

    For a corpus split by subset alone: files that were released already mixed hold the weights in their text, and
    applying them again would square them. The published weights are shares of text; here they are shares of tokens,
    which differ from these as far as a subset's bytes per token differ from the mean.

    Args:
        name: a key of `PUBLISHED`.
        folder: holds one prepared dataset for each subset, in a folder called by the subset's `slug`.

    Returns:
        sources with their published weights, in the order of the table, named by the subset; and notices: which subsets
        are missing and what share their absence gives to the others, which datasets are no subset.

    Raises:
        MixtureError: an unknown name, a URL, no subset at all, or a subset's folder that holds no finished dataset.
    """
    if name not in PUBLISHED:
        raise MixtureError(f"published mixture {name!r} is unknown; known: {', '.join(PUBLISHED)}")
    if is_url(folder):
        raise MixtureError(
            f"published mixture {name}: {shown(os.fspath(folder))} is no local folder whose subsets could be listed; "
            f"write the sources one by one with their weights"
        )
    weights, root = PUBLISHED[name], Path(folder)
    found = {subset: root / slug(subset) for subset in weights if (root / slug(subset)).exists()}
    if not found:
        raise MixtureError(
            f"{root} holds no subset of the mixture {name}; expected folders like {slug(next(iter(weights)))}, each a "
            f"prepared dataset; prepare the corpus split by subset"
        )
    for subset, path in found.items():
        if not (path / MANIFEST).is_file():
            raise MixtureError(
                f"{path} holds no {MANIFEST}: subset {subset} is not prepared to its end; finish it, or remove the "
                f"folder to train without it"
            )
    sources = tuple(SourceSpec(path, weights[subset], subset) for subset, path in found.items())
    return sources, tuple(_notices(name, weights, found, root))


def _notices(name: str, weights: dict[str, float], found: dict[str, Path], root: Path) -> list[str]:
    notices = []
    missing = [subset for subset in weights if subset not in found]
    if missing:
        lost, whole = sum(weights[subset] for subset in missing), sum(weights.values())
        notices.append(
            f"mixture {name}: {len(missing)} of {len(weights)} subsets are not in {root} ({', '.join(missing)}); their "
            f"{100 * lost / whole:.2f} % of the weight goes to the others, each of which counts "
            f"{whole / (whole - lost):.4f} times as much"
        )
    known = {slug(subset) for subset in weights}
    others = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}") if path.parent.name not in known)
    if others:
        notices.append(f"mixture {name}: {', '.join(others)} in {root} are no subsets of it and are not read")
    return notices
