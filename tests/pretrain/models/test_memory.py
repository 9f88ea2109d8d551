"""What an attention layer remembers of the segment before."""

from __future__ import annotations

import pytest
import torch

from potamos.pretrain.models import registry
from potamos.pretrain.models.interfaces import Context, Seq

WIDTH, LENGTH = 8, 6


@pytest.mark.parametrize("memory", [1, 3, 6])
def test_memory_is_the_last_keys(memory: int) -> None:
    attention = registry.lookup("mixer", "attention")
    options = attention.Options(kind="attention", heads=2, memory=memory)
    pattern = registry.lookup("pattern", "full")
    context = Context(width=WIDTH, layers=1, pattern=pattern(pattern.Options(kind="full")))
    mixer = attention(options, context).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 2 * LENGTH, WIDTH, dtype=torch.float64, generator=generator)
    ids = torch.zeros(2, 2 * LENGTH, dtype=torch.int32)

    def run(begin: int, end: int, state=None):
        positions = torch.arange(begin, end).expand(2, -1)
        return mixer(x[:, begin:end], Seq(positions, document_ids=ids[:, begin:end]), state)

    kept = mixer.segment_state(run(0, LENGTH).state)
    assert kept.keys.shape[2] == kept.values.shape[2] == kept.documents.shape[1] == memory
    found = run(LENGTH, 2 * LENGTH, kept).hidden
    alone = run(LENGTH - memory, 2 * LENGTH).hidden[:, memory:]  # a row that begins with the remembered tokens
    assert torch.allclose(found, alone, atol=1e-12, rtol=0)
    assert not torch.allclose(found, run(LENGTH - memory + 1, 2 * LENGTH).hidden[:, memory - 1 :], atol=1e-3)
