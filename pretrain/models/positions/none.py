"""No position scheme: causal mixers learn positions by themselves (Haviv et al. 2022)."""

from __future__ import annotations

from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Positions
from potamos.pretrain.models.registry import register


@register("positions", "none")
class NoPositions(Positions):
    """Adds nothing anywhere."""

    class Options(interfaces.Options):
        kind: str = "none"
