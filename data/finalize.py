"""Finished parts become a dataset: shards moved together, described, and given their final name in one rename.

Every step can be cut off anywhere and taken again: a shard lies either with its part or already in the dataset, the
description is made from the parts' each time, and what is to be removed goes only after the dataset has its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from potamos.data.errors import DatasetError, SourceError
from potamos.data.manifest import MANIFEST, Manifest, make_manifest, read_manifest, totals, verify
from potamos.data.parts import REJECTS, missing_shard, read_part
from potamos.data.shards import index_path
from potamos.data.workfolder import WorkFolder, place_of, read_json, rename_durably, to_json
from potamos.files import flush, write_atomically

GROUPS = "groups.json"
DATASET_SETTINGS = ("source", "split", "tokenizer", "dtype", "chunk_tokens", "shard_chunks", "deduplicated")


def finalize(out: str | os.PathLike[str], *, force: bool = False, wait: float = 600.0) -> dict[Path, Manifest]:
    """Make the dataset ``out`` of the parts that `prepare_parts` wrote; nothing to do where that was done.

    Args:
        out: the dataset's folder, or the folder of the groups' datasets.
        force: replace another dataset there.
        wait: seconds to wait for processes that are still at work.

    Returns:
        Each dataset's folder and manifest: ``out`` itself, or one folder a group.

    Raises:
        DatasetError: a part is missing or not whole, others are at work, or ``out`` holds something else.
        SourceError: the source gave no text.
    """
    out = place_of(out)
    work = WorkFolder(out)
    try:
        with work.alone(wait) as alone:
            if not alone:
                raise DatasetError(f"{out} is still being prepared after {wait:.0f} s; finalize when that has ended")
            settings = work.read_settings()
            if settings is not None and not work.final.exists():
                return _finalize(out, work, settings, force)
            work.remove()
    except FileNotFoundError:
        if work.path.exists():
            raise
    if not out.exists():
        raise DatasetError(f"nothing was prepared for {out}: there is no {work.path}; run `potamos data prepare` first")
    return read_datasets(out)


def remove_published(out: Path) -> None:
    """Finish a `finalize` that was cut off after the dataset had its name."""
    work = WorkFolder(out)
    with contextlib.suppress(FileNotFoundError), work.alone(0.0) as alone:
        if alone and (work.final.exists() or _is_published(out, work)):
            work.remove()


def _finalize(out: Path, work: WorkFolder, settings: dict[str, Any], force: bool) -> dict[Path, Manifest]:
    refuse_other_things(out)
    if not _is_published(out, work):
        parts = _read_parts(work, settings)
        manifests = _manifests(settings, parts)
        top = _top(settings, parts, manifests)
        if not manifests or sum(manifest.tokens for manifest in manifests.values()) < 2:
            _publish_rejects(out, work, len(parts))
            work.remove()
            source, blank = settings["source"], sum(part["blank"] for part in parts)
            raise SourceError(
                f"source {source.get('name', source['kind'])!r} gave no document with text ({blank} blank, "
                f"{sum(part['rejected'] for part in parts)} bad); nothing to prepare: choose another source"
            )
        _refuse_replacing(out, top, force)
        _gather(work, manifests, top)
        _publish_rejects(out, work, len(parts))
        _publish(out, work)
    write_atomically(work.final, to_json({"out": out.name}))
    work.remove()
    return read_datasets(out)


def _read_parts(work: WorkFolder, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of all inputs in order."""
    parts, missing = [], []
    for number, name in enumerate(settings["inputs"]):
        part = read_part(work, number)
        gap = None if part is None else missing_shard(work, number, part)
        if part is None or gap is not None:
            missing.append(f"{number} ({name})" if gap is None else f"{number} ({name}: {gap.name} is not whole)")
        else:
            parts.append(part)
    if missing:
        some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise DatasetError(
            f"{work.out}: {len(missing)} of {len(settings['inputs'])} parts are missing: {some}; run the same `potamos "
            f"data prepare` again, with any number of processes: it goes on with these"
        )
    return parts


def _manifests(settings: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Manifest]:
    """The manifest of each group that has text, by slug, the empty one where nothing is grouped."""
    values: dict[str, str] = {}
    filled: set[str] = set()
    for part in parts:
        for slug, group in part["groups"].items():
            if values.setdefault(slug, group["value"]) != group["value"]:
                raise SourceError(
                    f"the values {values[slug]!r} and {group['value']!r} of {settings['by']!r} have the same folder "
                    f"name {slug!r}; rename one in the source"
                )
            if group["tokens"]:
                filled.add(slug)
    return {slug: _manifest(settings, parts, slug, values[slug]) for slug in sorted(filled)}


def _manifest(settings: dict[str, Any], parts: list[dict[str, Any]], slug: str, value: str) -> Manifest:
    grouped = settings["by"] is not None
    described = []
    for part in parts:
        group = part["groups"].get(slug) or {
            "shards": [], "tokens": 0, "documents": 0, "text_bytes": 0, "max_token": 0, "duplicates": 0,
        }  # fmt: skip
        described.append(
            {
                "name": part["input"],
                "files": part["files"],
                **{key: value for key, value in group.items() if key != "value"},
                # What never became a document belongs to no group; groups.json counts it.
                **{key: 0 if grouped else part[key] for key in ("blank", "rejected", "mended")},
            }
        )
    fields = {key: settings[key] for key in DATASET_SETTINGS}
    if grouped:
        fields["source"] = {**fields["source"], "by": settings["by"], "value": value}
    return make_manifest({"layout": "chunks", **fields, "parts": described, **totals(described)})


def _top(settings: dict[str, Any], parts: list[dict[str, Any]], manifests: dict[str, Manifest]) -> bytes:
    """The file that describes the whole of ``out`` and is written last: dataset.json, or groups.json."""
    if settings["by"] is None:
        return manifests[""].to_bytes() if manifests else b""
    fields = {
        "format": "potamos-groups",
        "by": settings["by"],
        **{key: settings[key] for key in DATASET_SETTINGS},
        "inputs": [{key: part[key] for key in ("input", "files", "blank", "rejected", "mended")} for part in parts],
        "groups": {
            slug: {
                "value": manifest.fields["source"]["value"],
                "documents": manifest.documents,
                "tokens": manifest.tokens,
                "text_bytes": manifest.text_bytes,
                "fingerprint": manifest.fingerprint,
            }
            for slug, manifest in manifests.items()
        },
        # Groups of which nothing is left have no dataset; their duplicates are counted here.
        "empty": [
            {"input": part["input"], "value": group["value"], "duplicates": group["duplicates"]}
            for part in parts
            for slug, group in part["groups"].items()
            if slug not in manifests
        ],
    }
    return to_json({**fields, "fingerprint": _fingerprint(fields)})


def _fingerprint(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- steps -------------------------------------------------------------------------------------------------------


def _gather(work: WorkFolder, manifests: dict[str, Manifest], top: bytes) -> None:
    """Move all shards into the dataset's folder and describe them there."""
    work.dataset.mkdir(exist_ok=True)
    for slug, manifest in manifests.items():
        folder = work.dataset / slug
        folder.mkdir(exist_ok=True)
        for number, part in enumerate(manifest.parts):
            for shard in part["shards"]:
                for name in (shard["name"], index_path(Path(shard["name"])).name):
                    with contextlib.suppress(FileNotFoundError):  # moved before
                        os.replace(work.part(number) / slug / name, folder / name)
        _remove_unlisted(folder, manifest)
        write_atomically(folder / MANIFEST, manifest.to_bytes())
    if "" not in manifests:
        for extra in work.dataset.iterdir():  # groups of an input that has changed since, half-written files
            if extra.name not in manifests:
                shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
        write_atomically(work.dataset / GROUPS, top)


def _remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Remove what an earlier attempt left: shards of a part that was written again since, half-written files."""
    names = {shard["name"] for shard in manifest.shards}
    listed = names | {index_path(Path(name)).name for name in names}
    for path in folder.iterdir():
        if path.name not in listed:
            path.unlink()


def _publish(out: Path, work: WorkFolder) -> None:
    """Give the dataset its name; another one that has it is put aside first."""
    if out.exists():
        shutil.rmtree(work.replaced, ignore_errors=True)
        os.replace(out, work.replaced)
    rename_durably(work.dataset, out)


def _publish_rejects(out: Path, work: WorkFolder, parts: int) -> None:
    """Join the parts' bad lines beside the dataset, or remove those of the dataset that it replaces."""
    target = out.with_name(f"{out.name}.{REJECTS}")
    found = [path for number in range(parts) if (path := work.part(number) / REJECTS).exists()]
    if not found:
        target.unlink(missing_ok=True)
        return
    joined = work.path / REJECTS
    with open(joined, "wb") as file:
        for path in found:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(joined, target)
    flush(target.parent)


def _is_published(out: Path, work: WorkFolder) -> bool:
    """Whether the finished parts are what ``out`` holds already, and holds whole."""
    settings = work.read_settings()
    if settings is None or not out.is_dir() or work.dataset.exists():
        return False
    parts = [read_part(work, number) for number in range(len(settings["inputs"]))]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return False
    manifests = _manifests(settings, whole)
    return bool(manifests) and _top_of(out) == _top(settings, whole, manifests) and is_sound(out)


# --- what is there already ---------------------------------------------------------------------------------------


def refuse_other_things(out: Path) -> None:
    """Never touch a folder or file that is no dataset."""
    if not out.exists() or holds_dataset(out):
        return
    if not out.is_dir() or any(out.iterdir()):
        raise DatasetError(f"{out} exists and is no dataset; choose another place or remove it yourself")


def _refuse_replacing(out: Path, top: bytes, force: bool) -> None:
    there = _top_of(out)
    if there is not None and there != top and not force:
        raise DatasetError(f"{out} already holds a dataset of other texts; choose another place or --force")


def holds_dataset(out: Path) -> bool:
    """Whether a dataset, or datasets of groups, lie there, sound or not."""
    return any((out / name).is_file() for name in (MANIFEST, GROUPS))


def _top_of(out: Path) -> bytes | None:
    for name in (MANIFEST, GROUPS):
        if (out / name).is_file():
            return (out / name).read_bytes()
    return None


def is_sound(out: Path) -> bool:
    """Whether every dataset in ``out`` has all its shards, in full size and with their own indexes."""
    try:
        return all(verify(path).ok for path in read_datasets(out))
    except DatasetError:
        return False


def read_datasets(out: Path) -> dict[Path, Manifest]:
    """The folder and manifest of each dataset in ``out``: its own, or those of its groups.

    Raises:
        DatasetError: no dataset there, or a damaged description.
    """
    groups = read_groups(out)
    if groups is None:
        return {out: read_manifest(out)}
    return {out / slug: read_manifest(out / slug) for slug in groups["groups"]}


def read_groups(out: Path) -> dict[str, Any] | None:
    """The content of groups.json, None where ``out`` is no folder of groups.

    Raises:
        DatasetError: damaged or edited.
    """
    fields = read_json(out / GROUPS)
    if fields is None:
        return None
    if not isinstance(fields, dict) or fields.pop("fingerprint", None) != _fingerprint(fields):
        raise DatasetError(f"{out / GROUPS} was changed after it was written; prepare again with --force")
    return fields
