"""Sections and components: how a block of a recipe is checked, and how what is wrong with it is reported.

A component (mixer, positions, objective, ...) is a block with ``kind`` and that system's own settings; the registry
says which settings those are, so nothing here names a system.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from potamos.pretrain.models import registry

registry.add_package("potamos.pretrain.objectives")

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
Location = tuple[str | int, ...]


class Section(BaseModel):
    """One block of a recipe."""

    model_config = STRICT


def problem(message: str, location: Location = (), value: Any = None, *, absolute: bool = False) -> ValidationError:
    """One thing wrong at ``location``, relative to the block being checked unless ``absolute``."""
    context: dict[str, Any] = {"text": message}
    if absolute:
        context["location"] = location
    # The text is a value of the template, not the template: a user's braces are then only braces.
    details = InitErrorDetails(
        type=PydanticCustomError("problem", "{text}", context), loc=() if absolute else location, input=value
    )
    return ValidationError.from_exception_data("recipe", [details])


def merge(problems: list[ValidationError]) -> ValidationError:
    """Several errors of one block as one."""
    details = []
    for error in (e for problem_ in problems for e in problem_.errors(include_url=False)):
        context = error.get("ctx", {})
        kind = PydanticCustomError("problem", "{text}", context) if error["type"] == "problem" else error["type"]
        details.append(InitErrorDetails(type=kind, loc=error["loc"], input=error["input"], ctx=context))
    return ValidationError.from_exception_data("recipe", details)


def suggestion(name: Any, known: Collection[str]) -> str:
    """``; did you mean `state`?`` with the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def unknown(what: str, name: Any, known: Collection[str]) -> str:
    """That there is no such name, the nearest one and all others."""
    return f"unknown {what}{suggestion(name, known)} (known: {', '.join(known)})"


# --- components ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Component:
    """Annotation of a field whose block names a system by ``kind`` and is validated by that system's ``Options``.

    ``room`` is a room of the registry, or only a label where ``table`` lists the choices. ``default`` is the kind of a
    block that names none. ``optional`` admits null, also written ``{kind: none}``: no such component.
    """

    room: str
    default: str | None = None
    optional: bool = False
    table: Mapping[str, type[BaseModel]] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        del source, handler
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda options: None if options is None else options.model_dump(by_alias=True)
            ),
        )

    def kinds(self) -> list[str]:
        """Every kind that the block may name."""
        return list(self.table) if self.table is not None else registry.names(self.room)

    def options(self, kind: Any) -> type[BaseModel] | None:
        """The settings that go with ``kind``; None if there is no such kind."""
        if kind is None:
            kind = self.default
        if not isinstance(kind, str) or kind not in self.kinds():
            return None
        return self.table[kind] if self.table is not None else registry.lookup(self.room, kind).Options

    def validate(self, value: Any) -> BaseModel | None:
        """The ``Options`` of a block, or ValidationError."""
        if isinstance(value, BaseModel):
            return self._validate_instance(value)
        if self.optional and (value is None or value == {"kind": "none"}):
            return None
        if not isinstance(value, Mapping):
            hint = f"write {{kind: {value}}}" if isinstance(value, str) else f"known kinds: {', '.join(self.kinds())}"
            raise problem(f"expected a block with `kind`; {hint}", value=value)
        kind = value.get("kind", self.default)
        if kind is None:
            raise problem(f"`kind` is missing; name one of {', '.join(self.kinds())}", value=dict(value))
        if not isinstance(kind, str):
            raise problem("expected text", ("kind",), kind)
        options = self.options(kind)
        if options is None:
            known = [*self.kinds(), "none"] if self.optional else self.kinds()
            raise problem(unknown(self.room, kind, known), ("kind",), kind)
        return options.model_validate({**value, "kind": kind})

    def _validate_instance(self, value: BaseModel) -> BaseModel:
        options = self.options(getattr(value, "kind", None))
        if options is None or not isinstance(value, options):
            raise problem(f"{type(value).__name__} holds no settings of a {self.room}", value=value)
        return value
