"""Every key that causality and documents allow."""

from __future__ import annotations

from torch import Tensor

from potamos.kernels.attention import Mask
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Pattern
from potamos.pretrain.models.registry import register


@register("pattern", "full")
class Full(Pattern):
    """Attention without a pattern of its own."""

    class Options(interfaces.Options):
        kind: str = "full"

    def mask(
        self, *, causal: bool, query_offset: int, query_documents: Tensor | None, key_documents: Tensor | None
    ) -> Mask:
        return Mask(
            causal=causal,
            query_offset=query_offset,
            query_documents=query_documents,
            key_documents=key_documents,
        )
