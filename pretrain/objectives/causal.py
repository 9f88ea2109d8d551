"""Next-token prediction."""

from __future__ import annotations

import numpy as np
import torch

from potamos.data.loader import Rows
from potamos.pretrain.models import interfaces
from potamos.pretrain.models.interfaces import Seq, State
from potamos.pretrain.models.registry import register
from potamos.pretrain.models.trunk import Model
from potamos.pretrain.objectives.base import Batch, Objective, Term, Terms, with_auxiliary


@register("objective", "causal")
class Causal(Objective):
    """-log p(token t+1 | tokens of the same document up to t), summed over targets.

    The end-of-document token is predicted like any other and predicts nothing: what follows belongs to another
    document. Targets are shifted here, before anything can be split.
    """

    class Options(interfaces.Options):
        kind: str = "causal"

    def prepare(self, rows: Rows, *, seed: int, step: int, carried: bool = False) -> Batch:
        documents = rows.document_ids
        inside = (documents[:, 1:] == documents[:, :-1]) & (documents[:, :-1] >= 0)
        targets = np.where(inside, rows.tokens[:, 1:], -1).astype(np.int64)
        # The host knows whether any row has a boundary; asking a GPU would stall it.
        uniform = bool((documents[:, :1] == documents[:, :-1]).all()) and not carried
        seq = Seq(
            positions=torch.from_numpy(rows.positions[:, :-1].astype(np.int64)),
            document_ids=None if uniform else torch.from_numpy(np.ascontiguousarray(documents[:, :-1])),
            samples=torch.from_numpy(rows.samples.astype(np.int64)),
            seed=seed,
            step=step,
        )
        return Batch(
            inputs={"tokens": torch.from_numpy(rows.tokens[:, :-1].astype(np.int64))},
            seq=seq,
            targets={"tokens": torch.from_numpy(targets)},
            counts={"tokens": int(inside.sum())},
            scored=targets,
        )

    def forward(self, model: Model, batch: Batch, state: State = None) -> Terms:
        out = model(batch.inputs, batch.seq, state)
        nll = model.frontend.nll(out.hidden, batch.targets["tokens"])
        return with_auxiliary(Terms({"causal": Term(nll, "tokens")}, out.state), out.aux, {})
