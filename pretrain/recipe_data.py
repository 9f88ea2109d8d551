"""The data half of a recipe: the tokenizer, the mixture and its stages, the order of samples, what to do about damage.

What the settings mean is said in ``potamos.data``; here they are checked as far as a recipe alone can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationInfo, WrapValidator, field_validator, model_validator

from potamos.data.errors import MixtureError
from potamos.data.order import check_weights
from potamos.pretrain.component import STRICT, Location, Section, merge, problem

WINDOW = 16  # shards: 4 GiB of full ones, and as much again for the window that is fetched meanwhile


class Tokenizer(Section):
    """``json``: a Hugging Face tokenizer.json; ``gpt2``: a folder with GPT-2's vocabulary and merges, or a .tiktoken
    file; ``sentencepiece``: a .model file.

    ``special_tokens`` are added after the last id where the vocabulary lacks them. ``end_of_document``: the token that
    closes a document; null looks for the usual names."""

    kind: Literal["json", "gpt2", "sentencepiece"]
    path: str = Field(min_length=1)
    special_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    end_of_document: str | None = Field(None, min_length=1)

    @field_validator("special_tokens")
    @classmethod
    def _once_each(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        again = [i for i, token in enumerate(tokens) if token in tokens[:i]]
        if again:
            raise merge([problem("named twice; take it out once", (i,), tokens[i]) for i in again])
        return tokens


# --- mixtures --------------------------------------------------------------------------------------------


class Source(Section):
    """A prepared dataset: a folder or a URL. ``label`` is what logs call it: ``name``, or the last part of the path."""

    path: str = Field(min_length=1)
    name: str | None = Field(None, min_length=1)

    @property
    def label(self) -> str:
        return self.name or PurePath(self.path).name


class WeightedSource(Source):
    """A source of a mixture; its share of the samples is its weight over the sum of weights."""

    weight: float = 1.0


class Published(Section):
    """A mixture with published weights. ``pile``: those of Gao et al. 2020, Table 1, for the subsets prepared under
    ``path`` in folders of their names (pile-cc, pubmed-central, ...); the weights of missing ones go to the others."""

    published: Literal["pile"]
    path: str = Field(min_length=1)

    @field_validator("path")
    @classmethod
    def _local(cls, path: str) -> str:
        if _is_url(path):
            raise problem("no local folder, so its subsets cannot be listed; write them one by one", value=path)
        return path


_SOURCES = TypeAdapter(tuple[WeightedSource, ...], config=STRICT)


def _list_or_published(value: Any, handler: Any) -> tuple[WeightedSource, ...] | Published:
    """One of the two by its form, so that a mistake inside is told as one of that form."""
    del handler
    if isinstance(value, Published | Mapping):
        return Published.model_validate(value)
    return _SOURCES.validate_python(value)


MixtureField = Annotated[tuple[WeightedSource, ...] | Published, WrapValidator(_list_or_published)]


class Stage(Section):
    """From global sample ``start`` (written ``from``) on, samples are drawn from ``mixture``: a list of sources, or a
    published mixture."""

    start: int = Field(0, ge=0, alias="from")
    mixture: MixtureField

    @property
    def sources(self) -> tuple[WeightedSource, ...]:
        """What the recipe itself lists; nothing of a published mixture, whose folder decides."""
        return () if isinstance(self.mixture, Published) else self.mixture

    @model_validator(mode="after")
    def _mixable(self) -> Self:
        if isinstance(self.mixture, Published):
            return self
        _distinct(self.mixture, ("mixture",))
        try:
            check_weights([s.weight for s in self.mixture], [s.label for s in self.mixture])
        except MixtureError as error:
            raise problem(str(error), ("mixture",), [s.weight for s in self.mixture]) from None
        return self


# --- the section -----------------------------------------------------------------------------------------


class Cache(Section):
    """Where shards of datasets behind URLs are kept, and how many ``bytes`` of them; the oldest make room."""

    path: str = Field(min_length=1)
    bytes: int = Field(gt=0)


class Data(Section):
    """Rows of ``sequence_length`` tokens; ``boundaries: isolate`` keeps documents of one row apart.

    ``order: shuffled`` permutes all rows of an epoch; ``window`` permutes the shards and then the rows of ``window``
    shards at a time, for data that are fetched; ``contiguous`` continues each row in the next step and carries the
    state of mixers that have one. Samples in the ranges of ``skip``, [first, end), are left out. A source smaller than
    its share of one batch is refused unless ``allow_repeat``. ``on_bad_shard: skip`` leaves out shards that are missing
    or damaged at the start; damage met later always ends the run."""

    sequence_length: int = Field(ge=2, le=262_144)  # a chunk of the shard format holds 262,144 targets
    boundaries: Literal["isolate", "cross"] = "isolate"
    order: Literal["shuffled", "contiguous", "window"] = "shuffled"
    window: int | None = Field(None, gt=0, validate_default=True)
    skip: tuple[tuple[int, int], ...] = ()
    allow_repeat: bool = False
    on_bad_shard: Literal["error", "skip"] = "error"
    cache: Cache | None = None
    stages: tuple[Stage, ...]
    validation: tuple[Source, ...] = ()

    @field_validator("window")
    @classmethod
    def _only_in_windows(cls, window: int | None, info: ValidationInfo) -> int | None:
        order = info.data.get("order")
        if order == "window":
            return WINDOW if window is None else window
        if window is not None and order is not None:
            raise problem(f"would do nothing in data.order: {order}; take it out, or set data.order: window")
        return window

    @field_validator("skip")
    @classmethod
    def _ranges(cls, skip: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        wrong = [i for i, (first, end) in enumerate(skip) if not 0 <= first < end < 2**62]
        if wrong:
            message = "a range is [first, end) with 0 <= first < end, the end itself being read"
            raise merge([problem(message, (i,), list(skip[i])) for i in wrong])
        return skip

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if not stages:
            raise problem("training needs at least one stage; write [{from: 0, mixture: [{path: ...}]}]", value=[])
        if stages[0].start != 0:
            raise problem("the first stage starts at sample 0; set from: 0", (0, "from"), stages[0].start)
        late = [i for i in range(1, len(stages)) if stages[i].start <= stages[i - 1].start]
        if late:
            raise merge(
                [
                    problem(
                        f"stages start one after another; the one before starts at {stages[i - 1].start}, choose more",
                        (i, "from"),
                        stages[i].start,
                    )
                    for i in late
                ]
            )
        return stages

    @field_validator("validation")
    @classmethod
    def _named_apart(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        _distinct(sources, ())
        far = [i for i, source in enumerate(sources) if _is_url(source.path)]
        if far:
            message = "held-out data are read whole at every validation; copy them to a local folder"
            raise merge([problem(message, (i, "path"), sources[i].path) for i in far])
        return sources

    @model_validator(mode="after")
    def _within_reach(self) -> Self:
        far = [
            (("stages", number, "mixture", index, "path"), source.path)
            for number, stage in enumerate(self.stages)
            for index, source in enumerate(stage.sources)
            if _is_url(source.path)
        ]
        if not far:
            return self
        place, path = far[0]
        if self.order != "window":
            message = (
                f"is behind a URL, and order {self.order} reads all shards at once; set data.order: window, which "
                "fetches a few at a time, or copy it to a local folder"
            )
            raise problem(message, place, path)
        if self.cache is None:
            message = "is behind a URL; say where its shards may be kept: data.cache: {path: FOLDER, bytes: NUMBER}"
            raise problem(message, place, path)
        return self


def _is_url(path: str) -> bool:
    return "://" in path


def _distinct(sources: tuple[Source, ...], location: Location) -> None:
    labels: dict[str, int] = {}
    for index, source in enumerate(sources):
        if source.label in labels:
            message = f"a second source called {source.label!r}; give each its own `name`"
            raise problem(message, (*location, index), source.path)
        labels[source.label] = index
