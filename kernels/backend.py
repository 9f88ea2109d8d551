"""The choice of implementation shared by every operation: `auto | triton | torch`."""

from typing import Literal

Backend = Literal["auto", "triton", "torch"]


class BackendUnavailableError(ValueError):
    """The caller asked for an implementation that this version or this machine does not have."""


def resolve_backend(backend: str, operation: str) -> Literal["torch"]:
    """Turn the caller's wish into the implementation that runs.

    `auto` never fails; a named backend is used or refused, never replaced silently.

    Raises:
        BackendUnavailableError: for "triton", which this version does not have.
        ValueError: for an unknown name.
    """
    if backend in ("auto", "torch"):
        return "torch"
    if backend == "triton":
        raise BackendUnavailableError(
            f"{operation}: backend='triton' is not available in this version; use backend='auto' or 'torch'"
        )
    raise ValueError(f"{operation}: unknown backend {backend!r}; choose 'auto', 'triton' or 'torch'")
