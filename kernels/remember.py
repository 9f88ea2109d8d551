"""Tables that are made once: `functools.lru_cache`, but for what is made while a dispatch mode is on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

from torch.utils._python_dispatch import _get_current_dispatch_mode

F = TypeVar("F", bound=Callable[..., Any])


def remembered(maxsize: int) -> Callable[[F], F]:
    """Remember what a function of hashable arguments returned, for the last `maxsize` of them.

    What is made under a dispatch mode (fake tensors, while a plan is traced) is not for other calls, nor the reverse.
    """

    def decorate(function: F) -> F:
        kept = lru_cache(maxsize)(function)

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return (kept if _get_current_dispatch_mode() is None else function)(*arguments, **named)

        return cast(F, call)

    return decorate
