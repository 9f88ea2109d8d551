"""What a recipe holds: a tree of frozen sections, each refusing unknown keys and wrong types.

Reading, overriding and comparing: ``config.py``. Components, the blocks with a ``kind``: ``component.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, WrapValidator, field_validator, model_validator
from typing_extensions import TypedDict

from potamos.parallel.facts import Layout
from potamos.pretrain.component import STRICT, Component, Location, Section, merge, problem, unknown
from potamos.pretrain.fit import check_component, check_components
from potamos.pretrain.models.interfaces import Options
from potamos.pretrain.models.linear import NORMS, NormOptions
from potamos.pretrain.recipe_data import Data, Tokenizer

MixerField = Annotated[Options, Component("mixer")]
ChannelField = Annotated[Options | None, Component("channel", optional=True)]
PositionsField = Annotated[Options, Component("positions", default="none")]
PatternField = Annotated[Options, Component("pattern", default="full")]


def _default(kind: str) -> Any:
    """A component with its own defaults, looked up only when a recipe is read."""
    return Field(default={"kind": kind}, validate_default=True)


def _defaults() -> Any:
    """A section with nothing set."""
    return Field(default={}, validate_default=True)


# --- model -----------------------------------------------------------------------------------------------


class LayerOverride(TypedDict, total=False):
    """What one layer has in place of the model's own; each present entry replaces the whole block."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]

    mixer: MixerField
    channel: ChannelField
    positions: PositionsField
    pattern: PatternField


@dataclass(frozen=True)
class Layer:
    """The components of one layer."""

    mixer: Options
    channel: Options | None
    positions: Options
    pattern: Options


class ModelSection(Section):
    """The model: ``layers`` blocks of ``width`` channels, all alike but for the layers (0-based) named in ``at``."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    frontend: Annotated[Options, Component("frontend")]
    mixer: MixerField
    channel: ChannelField
    positions: PositionsField = _default("none")
    pattern: PatternField = _default("full")
    norm: NormOptions = _defaults()
    at: dict[int, LayerOverride] = Field(default_factory=dict)
    stack: Annotated[Options, Component("stack", default="plain")] = _default("plain")
    init: Annotated[Options, Component("init", default="gpt2")] = _default("gpt2")
    residual_dropout: float = Field(0.0, ge=0.0, lt=1.0)

    def layer(self, index: int) -> Layer:
        """The components of layer ``index``: those of ``at`` over the model's own."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in LayerOverride.__annotations__}
        settings.update(self.at.get(index, {}))
        return Layer(**settings)

    @field_validator("norm")
    @classmethod
    def _known_norm(cls, norm: NormOptions) -> NormOptions:
        if norm.kind not in NORMS:
            raise problem(unknown("norm", norm.kind, NORMS), ("kind",), norm.kind)
        return norm

    @field_validator("at")
    @classmethod
    def _layers_exist(cls, at: dict[int, LayerOverride], info: ValidationInfo) -> dict[int, LayerOverride]:
        layers = info.data.get("layers")
        wrong = [i for i in at if layers is not None and not 0 <= i < layers]
        if wrong:
            message = f"there is no such layer: {layers} layers are numbered 0 to {(layers or 1) - 1}"
            raise merge([problem(message, (i,), i) for i in wrong])
        return at

    def components(self) -> Iterator[tuple[Location, str, Options]]:
        """(place, room, options) of every component that the recipe names."""
        for name, info in type(self).model_fields.items():
            for component in (m for m in info.metadata if isinstance(m, Component)):
                if (options := getattr(self, name)) is not None:
                    yield (name,), component.room, options
        for index, layer in self.at.items():
            for name, options in layer.items():
                if isinstance(options, Options):
                    yield ("at", index, name), name, options


# --- optimization ----------------------------------------------------------------------------------------


class Optimizer(Section):
    """What all optimizers share. ``clip`` bounds the global gradient norm; a step whose norm exceeds the mean of the
    last ``window`` norms by ``spike`` standard deviations is skipped. Null switches either off."""

    kind: str
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float | None = Field(1.0, gt=0)
    spike: float | None = Field(None, gt=0)
    window: int = Field(128, ge=2)

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        wrong = [i for i, beta in enumerate(betas) if not 0.0 <= beta < 1.0]
        if wrong:
            raise merge([problem("a decay rate lies in [0, 1); 0.9 and 0.95 are usual", (i,), betas[i]) for i in wrong])
        return betas


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"  # pyright: ignore[reportIncompatibleVariableOverride]


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest. ``matrix_lr`` null means ``lr``."""

    kind: Literal["muon"] = "muon"  # pyright: ignore[reportIncompatibleVariableOverride]
    matrix_lr: float | None = Field(None, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)


OPTIMIZERS: dict[str, type[BaseModel]] = {"adamw": AdamW, "muon": Muon}


class Constant(Section):
    """Linear warm-up over ``warmup`` steps, then the full learning rate."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(0, ge=0)
    # What the others set, so that every schedule reads alike.
    decay: ClassVar[int] = 0
    floor: ClassVar[float] = 1.0


class Decaying(Section):
    """Linear warm-up over ``warmup`` steps, then a fall to ``floor`` times the learning rate.

    ``cosine`` and ``linear`` reach the floor at step ``decay``, warm-up included, and stay there; ``wsd`` holds the
    full rate until ``train.steps - decay`` and falls linearly over the last ``decay`` steps.
    """

    kind: Literal["cosine", "linear", "wsd"]
    warmup: int = Field(0, ge=0)
    decay: int = Field(gt=0)
    floor: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _after_warmup(self) -> Self:
        if self.kind != "wsd" and self.decay < self.warmup:
            message = f"less than the warm-up of {self.warmup} steps; the floor is reached at step decay, so raise it"
            raise problem(message, ("decay",), self.decay)
        return self


SCHEDULES: dict[str, type[BaseModel]] = {
    "cosine": Decaying,
    "linear": Decaying,
    "wsd": Decaying,
    "constant": Constant,
}


class Train(Section):
    """``sequences``: rows of a step over all ranks. ``micro_sequences``: rows of one forward on one rank."""

    steps: int = Field(gt=0)
    sequences: int = Field(gt=0)
    micro_sequences: int = Field(gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.sequences % self.micro_sequences:
            message = f"not a multiple of train.micro_sequences {self.micro_sequences}; no row is padded or dropped"
            raise problem(message, ("sequences",), self.sequences)
        return self


# --- running ---------------------------------------------------------------------------------------------


def _size_or_all(value: Any, handler: Callable[[Any], Any]) -> Any:
    with contextlib.suppress(ValidationError):
        return handler(value)
    raise problem('expected a whole number above 0, or "all"', value=value)


Spread = Annotated[Annotated[int, Field(gt=0)] | Literal["all"], WrapValidator(_size_or_all)]


class Parallel(Section):
    """Sizes of the mesh's axes, as in `Layout`."""

    dp_replicate: Spread = "all"
    dp_shard: Spread = 1
    tp: int = Field(1, gt=0)
    pp: int = Field(1, gt=0)
    cp: int = Field(1, gt=0)
    ep: int = Field(1, gt=0)
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv", "dualpipe_v"] = "1f1b"
    engine: Literal["native"] = "native"
    sequence_parallel: bool = True
    cp_order: Literal["contiguous", "zigzag"] = "zigzag"
    cp_kinds: tuple[Literal["state", "a2a", "ring"], ...] = ()
    checkpointing: Literal["none", "full", "selective"] = "none"
    compile: Literal["inductor", "aot_eager"] | None = None

    def layout(self) -> Layout:
        """The same sizes, as `potamos.parallel` takes them."""
        return Layout(**self.model_dump())

    @model_validator(mode="after")
    def _one_rest(self) -> Self:
        if self.dp_replicate == self.dp_shard == "all":
            message = "dp_replicate is all as well, and only one axis can take the rest; give one of them a number"
            raise problem(message, ("dp_shard",), "all")
        return self


class Checkpoint(Section):
    """Save ``every`` steps; keep the last ``keep``, and for good those at multiples of ``keep_every``."""

    every: int = Field(1000, gt=0)
    keep: int = Field(3, gt=0)
    keep_every: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _kept_are_saved(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            message = f"not a multiple of checkpoint.every {self.every}: such steps are not saved"
            raise problem(message, ("keep_every",), self.keep_every)
        return self


class ValidationSection(Section):
    """Score the validation sets ``every`` steps, on at most ``sequences`` rows of each (null: all)."""

    every: int = Field(500, gt=0)
    sequences: int | None = Field(None, gt=0)


class Samples(Section):
    """Text written ``every`` steps (null: never): ``tokens`` tokens after each prompt."""

    every: int | None = Field(None, gt=0)
    prompts: tuple[str, ...] = ()
    tokens: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if self.every is not None and not self.prompts:
            raise problem('there is nothing to continue; add a prompt, as in ["The "]', ("prompts",), [])
        return self


class Telemetry(Section):
    """Log ``every`` steps. A rank without progress for ``watchdog`` seconds is reported and ended; null: never."""

    every: int = Field(10, gt=0)
    samples: Samples = _defaults()
    watchdog: float | None = Field(1800.0, gt=0)


class Slurm(Section):
    """What a job asks of the cluster; null leaves it to the cluster.

    One task a GPU; ``tasks_per_node`` is for nodes without. ``warning`` seconds before the time limit the ranks save;
    ``crashes`` attempts in a row without a new checkpoint end the run; ``preflight`` examines the nodes first.
    """

    nodes: int | None = Field(None, gt=0)
    gpus_per_node: int | None = Field(None, ge=0)
    tasks_per_node: int | None = Field(None, gt=0)
    cpus_per_task: int | None = Field(None, gt=0)
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    warning: int = Field(180, gt=0, lt=65536)
    crashes: int = Field(3, gt=0)
    preflight: bool = False
    container: str | None = None


class Recipe(Section):
    """Everything that decides a training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    family: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = Field("", pattern=r"^[^\n]*$")
    model: ModelSection
    objective: Annotated[Options, Component("objective", default="causal")] = _default("causal")
    tokenizer: Tokenizer
    data: Data
    optimizer: Annotated[AdamW | Muon, Component("optimizer", table=OPTIMIZERS)]
    schedule: Annotated[Decaying | Constant, Component("schedule", table=SCHEDULES)]
    train: Train
    parallel: Parallel = _defaults()
    checkpoint: Checkpoint = _defaults()
    validation: ValidationSection = Field(default={}, validate_default=True, alias="validate")
    telemetry: Telemetry = _defaults()
    slurm: Slurm = _defaults()

    # Checks across sections hang on the later section, so that they run when only others are wrong.
    @field_validator("data", mode="wrap")
    @classmethod
    def _components_fit(cls, value: Any, handler: Callable[[Any], Data], info: ValidationInfo) -> Data:
        length = value.get("sequence_length") if isinstance(value, Mapping) else getattr(value, "sequence_length", None)
        model, objective, problems = info.data.get("model"), info.data.get("objective"), []
        if model is not None and type(length) is int:
            problems += check_components(model, length)
            if objective is not None:
                problems += check_component("objective", objective, ("objective",), model.width, length)
        data = None
        try:
            data = handler(value)
        except ValidationError as error:
            problems.append(error)
        if problems or data is None:
            raise merge(problems)
        return data

    @field_validator("train")
    @classmethod
    def _schedule_fits(cls, train: Train, info: ValidationInfo) -> Train:
        schedule = info.data.get("schedule")
        if schedule is not None and schedule.kind == "wsd" and schedule.warmup + schedule.decay > train.steps:
            message = f"with warm-up {schedule.warmup} more than train.steps {train.steps}; shorten one of them"
            raise problem(message, ("schedule", "decay"), schedule.decay, absolute=True)
        return train
