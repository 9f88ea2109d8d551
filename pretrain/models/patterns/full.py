"""Every key that causality and documents allow."""

from __future__ import annotations

from potamos.kernels.attention import Mask
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import AttentionCall, Pattern
from potamos.pretrain.models.registry import register


def documents_of(call: AttentionCall) -> Mask:
    """What every pattern begins with: causality, and nothing of other documents."""
    return Mask(
        causal=call.causal,
        query_offset=call.query_offset,
        query_documents=call.query_documents,
        key_documents=call.key_documents,
    )


@register("pattern", "full")
class Full(Pattern):
    """Attention without a pattern of its own."""

    class Options(interfaces.Options):
        kind: str = "full"

    def mask(self, call: AttentionCall) -> Mask:
        return documents_of(call)
