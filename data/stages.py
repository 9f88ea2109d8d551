"""Stages of a stream: which dataset each sample draws from, and as its how-many-eth draw."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from potamos.data.dataset import TokenDataset
from potamos.data.errors import MixtureError, TokenizerMismatchError
from potamos.data.fetch import shown
from potamos.data.order import Mixture, check_weights, derive_key
from potamos.data.remote import is_url


@dataclass(frozen=True)
class SourceSpec:
    """A prepared dataset, a folder or a URL, and its weight in a mixture; ``name`` defaults to the path, less what is
    secret in a URL."""

    path: str | os.PathLike[str]
    weight: float = 1.0
    name: str | None = None

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        path = os.fspath(self.path)
        return shown(path) if is_url(path) else path


@dataclass(frozen=True)
class StageSpec:
    """From global sample ``start`` on, rows are drawn from this mixture."""

    start: int
    mixture: tuple[SourceSpec, ...]


@dataclass(frozen=True)
class Stage:
    """An opened stage."""

    start: int
    sources: tuple[int, ...]  # numbers of datasets
    labels: tuple[str, ...]
    mixture: Mixture
    drawn_before: np.ndarray  # draws from each source in earlier stages

    def drawn(self, begin: int, end: int) -> np.ndarray:
        """Draws from each source among the global samples [begin, end), which lie in the stage."""
        until_end, until_begin = (np.array(self.mixture.drawn(sample - self.start)) for sample in (end, begin))
        return until_end - until_begin


class Stages:
    """The stages of a stream and their distinct datasets.

    How often a dataset was drawn from before counts over all stages, so one that two stages share goes on where it was.

    Args:
        specs: the first begins at sample 0, starts rise.
        seed: of the mixtures.
        slots: multiple at which stages must start, with one source each; None where there is no such rule.
        open_dataset: what opens a source.

    Raises:
        MixtureError: stages or weights that make no sense together.
        TokenizerMismatchError: datasets of different tokenizers.
    """

    def __init__(
        self,
        specs: Sequence[StageSpec],
        seed: int,
        slots: int | None,
        open_dataset: Callable[[SourceSpec], TokenDataset],
    ):
        starts = [spec.start for spec in specs]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise MixtureError(f"stages start at {starts}; the first must start at 0 and each later one after the last")
        if slots is not None and any(start % slots for start in starts):
            raise MixtureError(f"stages start at {starts}; contiguous order needs multiples of slots {slots}")
        self.datasets: list[TokenDataset] = []
        self._open_dataset, self._seed, self._slots = open_dataset, seed, slots
        self._by_path: dict[str, int] = {}
        self.stages: list[Stage] = []
        drawn: dict[int, int] = {}
        for number, (spec, end) in enumerate(zip(specs, [*starts[1:], None], strict=True)):
            stage = self._open_stage(number, spec, drawn)
            self.stages.append(stage)
            if end is not None:
                for source, count in zip(stage.sources, stage.drawn(stage.start, end).tolist(), strict=True):
                    drawn[source] = drawn.get(source, 0) + count
        self._starts = np.array(starts)

    def _open_stage(self, number: int, spec: StageSpec, drawn: dict[int, int]) -> Stage:
        labels = tuple(source.label for source in spec.mixture)
        shares = check_weights([source.weight for source in spec.mixture], labels)
        if self._slots is not None and len(labels) > 1:
            raise MixtureError(f"stage {number} mixes {len(labels)} sources; contiguous order reads one; prepare one")
        sources = tuple(self._open(source) for source in spec.mixture)
        if len(set(sources)) < len(sources):
            raise MixtureError(f"stage {number} names the same dataset twice ({', '.join(labels)}); add the weights")
        mixture = Mixture(shares, derive_key("mixture", self._seed, spec.start))
        return Stage(spec.start, sources, labels, mixture, np.array([drawn.get(s, 0) for s in sources], np.int64))

    def _open(self, spec: SourceSpec) -> int:
        """Number of the dataset; equal content is one dataset wherever it lies."""
        place = os.fspath(spec.path) if is_url(spec.path) else os.path.realpath(spec.path)
        if place not in self._by_path:
            dataset = self._open_dataset(spec)
            known = next((i for i, d in enumerate(self.datasets) if d.fingerprint == dataset.fingerprint), None)
            if known is None:
                known = len(self.datasets)
                self.datasets.append(dataset)
                mine, first = dataset.manifest.tokenizer["sha256"], self.datasets[0].manifest.tokenizer["sha256"]
                if mine != first:
                    raise TokenizerMismatchError(
                        f"datasets {self.datasets[0].path} (tokenizer {first[:12]}) and {dataset.path} ({mine[:12]}) "
                        f"were prepared with different tokenizers; prepare them with one"
                    )
            self._by_path[place] = known
        return self._by_path[place]

    def locate(self, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(dataset, where in ``samples``, number of the draw from the dataset), by stage and source."""
        if samples.size and samples.min() < 0:
            raise ValueError(f"sample {samples.min()} is negative")
        stage_of = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(stage_of).tolist():
            stage = self.stages[number]
            in_stage = np.flatnonzero(stage_of == number)
            member, draw = stage.mixture.locate(samples[in_stage] - stage.start)
            for m in np.unique(member).tolist():
                here = np.flatnonzero(member == m)
                yield stage.sources[m], in_stage[here], draw[here] + stage.drawn_before[m]

    def sources(self, first: int, last: int) -> set[int]:
        """Datasets of the stages that samples ``first`` to ``last`` lie in."""
        begin, end = np.searchsorted(self._starts, [first, last], side="right").tolist()
        return {source for stage in self.stages[begin - 1 : end] for source in stage.sources}

    def draws_of(self, ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Draws of each dataset that ascending ranges of samples hold, as ranges; for stages of one source each."""
        draws: list[list[tuple[int, int]]] = [[] for _ in self.datasets]
        for given in ranges:
            for stage, low, high in self.within(*given):
                if low == high:
                    continue
                (source,), offset = stage.sources, int(stage.drawn_before[0]) - stage.start
                begin, end = low + offset, high + offset
                if draws[source] and draws[source][-1][1] == begin:  # what lay between them was another dataset's
                    begin = draws[source].pop()[0]
                draws[source].append((begin, end))
        return draws

    def within(self, begin: int, end: int) -> Iterator[tuple[Stage, int, int]]:
        """Each stage with its part of the samples [begin, end), an empty part where they do not meet."""
        ends = [stage.start for stage in self.stages[1:]] + [max(end, self.stages[-1].start)]
        for stage, stage_end in zip(self.stages, ends, strict=True):
            low = min(max(begin, stage.start), stage_end)
            yield stage, low, max(low, min(end, stage_end))
