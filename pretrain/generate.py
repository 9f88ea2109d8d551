"""Text from a model: the prompt in one parallel pass, then one token at a time by the recurrent forms.

A state-space layer carries a state of constant size, an attention layer the keys and values of what it has seen; both
are the state that ``forward`` returns and ``step`` takes, so nothing here knows which layers a model has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from potamos.data.tokenizer import Tokenizer
from potamos.kernels.dropout import DropoutKey, philox
from potamos.pretrain.evaluate import evaluating
from potamos.pretrain.models.interfaces import Seq, State
from potamos.pretrain.models.trunk import Model


class GenerationError(ValueError):
    """Text cannot be generated as asked; names the setting or what is wrong with the model."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from scores.

    temperature: scores are divided by it; 0 takes the highest score. top_k: only the k likeliest tokens. top_p: only
    the fewest likeliest tokens that together have at least this probability (Holtzman et al. 2019), after ``top_k``.
    seed: keys the draws. Ties go to the lower id.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature {self.temperature} must be a number from 0 (always the likeliest) on")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k {self.top_k} must be at least 1; leave it out to allow every token")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p {self.top_p} must be above 0, at most 1; leave it out to allow every token")

    def choose(self, scores: Tensor, column: int) -> Tensor:
        """Ids (B,) from scores (B, vocabulary) for column ``column`` of each row; a function of these and the seed.

        Raises:
            GenerationError: the scores are not finite.
        """
        if not bool((scores < float("inf")).all() & (scores.amax(-1) > -float("inf")).all()):
            raise GenerationError("the model's scores are not finite: its weights are bad; use an earlier checkpoint")
        if self.temperature == 0.0:
            return scores.argmax(-1)
        ranked, ids = scores.double().sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked, ids = ranked[:, : self.top_k], ids[:, : self.top_k]
        # The highest score is subtracted first: a tiny temperature must not overflow.
        probabilities = ((ranked - ranked[:, :1]) / self.temperature).softmax(-1)
        cumulative = probabilities.cumsum(-1)
        if self.top_p is not None:
            probabilities = probabilities.where(cumulative - probabilities < self.top_p, 0.0)
            cumulative = probabilities.cumsum(-1)
        wanted = uniform(self.seed, len(scores), column, scores.device)[:, None] * cumulative[:, -1:]
        # The first token whose cumulated probability exceeds the draw; so never one of probability 0.
        place = torch.searchsorted(cumulative, wanted, right=True).clamp(max=probabilities.shape[-1] - 1)
        return ids.gather(-1, place)[:, 0]


def uniform(seed: int, rows: int, column: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws from [0, 1), (rows,) float64 with 53 random bits: Philox at (column, row), keyed by the seed."""
    row = torch.arange(rows, device=device)
    zero = torch.zeros_like(row)
    key = DropoutKey(seed=seed, purpose="generation", step=0, layer=0, samples=row).philox_key()
    high, low, *_ = philox((zero + column, row, zero, zero), key)
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


class Continuation:
    """Rows that a model is continuing: its state, and the document and position where each row stands.

    ``isolate``: after an end-of-document token the row is in its next document, at position 0, as in training rows that
    keep documents apart; otherwise the whole row is one document.
    """

    def __init__(self, model: Model, end_of_document: int, *, isolate: bool = True) -> None:
        self.model, self.end_of_document, self.isolate = model, end_of_document, isolate
        self.state: State = None
        self.documents = self.positions = torch.empty(0)  # (B,), of the token that comes next
        self.columns = 0  # tokens seen in each row

    def prefill(self, ids: Tensor) -> Tensor:
        """Read ids (B, L) int64 in one pass; the scores (B, vocabulary) of the token after them."""
        documents, positions = self._places(ids)
        several = self.isolate and bool((ids[:, :-1] == self.end_of_document).any())
        seq = Seq(positions=positions, document_ids=documents if several else None)
        with evaluating(self.model):
            out = self.model({"tokens": ids}, seq)
            return self._advance(out.hidden, out.state, ids[:, -1], documents[:, -1], positions[:, -1])

    def step(self, ids: Tensor) -> Tensor:
        """Read one more token of each row, (B,) int64; the scores (B, vocabulary) of the token after it."""
        assert self.columns > 0, "prefill comes first"
        seq = Seq(
            positions=self.positions[:, None],
            document_ids=self.documents[:, None],
            columns=torch.tensor([self.columns], device=ids.device),
        )
        with evaluating(self.model):
            out = self.model.step({"tokens": ids[:, None]}, seq, self.state)
            return self._advance(out.hidden, out.state, ids, self.documents, self.positions)

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Documents (int32) and positions (int64) of ids; an end-of-document token belongs to what it closes."""
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if not self.isolate:
            return torch.zeros_like(ids, dtype=torch.int32), columns
        begins = torch.zeros_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, :-1] == self.end_of_document
        return begins.cumsum(1).int(), columns - torch.where(begins, columns, 0).cummax(1).values

    def _advance(self, hidden: Tensor, state: State, ids: Tensor, documents: Tensor, positions: Tensor) -> Tensor:
        ended = (ids == self.end_of_document) & self.isolate
        self.documents = documents + ended.int()
        self.positions = torch.where(ended, 0, positions + 1)
        self.columns += hidden.shape[1]
        self.state = state
        return self.model.frontend.logits(hidden[:, -1])


def generate_ids(
    model: Model,
    prompts: Tensor,
    *,
    tokens: int,
    end_of_document: int,
    sampling: Sampling = Sampling(),
    stop_at_end: bool = True,
    isolate: bool = True,
    allowed: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue prompts (B, L) int64 by up to ``tokens`` ids a row, given out (B,) at a time.

    With ``stop_at_end`` a row that has ended repeats the end-of-document id, and generation stops when all rows have
    ended; otherwise the next document begins. No document is empty, so none begins with its end. ``allowed``: (n,)
    int64, the ids to choose from, None for all. Row r draws by (seed, column, r), whatever the other rows hold.

    Raises:
        GenerationError: at once where no tokens are asked for, the prompt is empty or the model looks ahead; while
            generating where scores are not finite.
    """
    if tokens < 1:
        raise GenerationError(f"tokens {tokens} must be at least 1")
    if prompts.shape[1] < 1:
        raise GenerationError("an empty prompt: begin with the end-of-document id")
    if not model.causal:
        raise GenerationError("this model sees what comes after a token, so it cannot write from left to right")
    return _continue(model, prompts, tokens, end_of_document, sampling, stop_at_end, isolate, allowed)


def _continue(
    model: Model,
    prompts: Tensor,
    tokens: int,
    end_of_document: int,
    sampling: Sampling,
    stop_at_end: bool,
    isolate: bool,
    allowed: Tensor | None,
) -> Iterator[Tensor]:
    rows = Continuation(model, end_of_document, isolate=isolate)
    previous = prompts[:, -1]
    finished = torch.zeros_like(previous, dtype=torch.bool)
    scores = rows.prefill(prompts)
    for count in range(1, tokens + 1):
        scores = _only(scores, allowed)
        scores[:, end_of_document].masked_fill_(previous == end_of_document, -torch.inf)
        previous = sampling.choose(scores, rows.columns)
        previous = torch.where(finished, end_of_document, previous)
        yield previous
        if stop_at_end:
            finished |= previous == end_of_document
            if bool(finished.all()):
                return
        if count < tokens:
            scores = rows.step(previous)


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_end: bool = True,
    boundaries: str = "isolate",
) -> Iterator[str]:
    """The text after ``prompt``, piece by piece; a piece never holds half a character.

    An empty prompt begins a document, from the end-of-document token of the one before. With ``boundaries: isolate``
    training predicts nothing from that token, so its first word is a guess: a few words of prompt do better.
    ``boundaries`` is the recipe's ``data.boundaries``. Without ``stop_at_end``, documents are parted by a blank line.

    Raises (at once, not with the first piece):
        GenerationError: a setting out of range, or a model that looks ahead.
    """
    device = next(model.parameters()).device
    end = tokenizer.end_of_document
    prompt_ids = torch.tensor([tokenizer.encode(prompt).tolist() or [end]], device=device)
    limit = model.max_positions
    if limit is not None and prompt_ids.shape[1] + tokens > limit:
        raise GenerationError(
            f"a prompt of {prompt_ids.shape[1]} tokens and {tokens} more go beyond the {limit} positions that the "
            f"model has; ask for at most {max(0, limit - prompt_ids.shape[1])} tokens"
        )
    ids = generate_ids(
        model,
        prompt_ids,
        tokens=tokens,
        end_of_document=end,
        sampling=Sampling(temperature, top_k, top_p, seed),
        stop_at_end=stop_at_end,
        isolate=boundaries == "isolate",
        allowed=_text_ids(tokenizer).to(device),
    )
    return _text(ids, tokenizer)


def _text(ids: Iterator[Tensor], tokenizer: Tokenizer) -> Iterator[str]:
    decoder = tokenizer.stream_decoder()
    blank_line = ""  # a new document is announced only when it comes
    for token in ids:
        piece = blank_line + decoder.push(int(token[0]))
        blank_line = "\n\n" if int(token[0]) == tokenizer.end_of_document else ""
        if piece:
            yield piece
    if piece := decoder.flush():
        yield piece


def _text_ids(tokenizer: Tokenizer) -> Tensor:
    """Ids that training data hold: no other special one than the end of a document, and none that only fill up the
    model's vocabulary to a round size."""
    never = tokenizer.special_ids - {tokenizer.end_of_document}
    return torch.tensor([i for i in range(tokenizer.vocabulary) if i not in never])


def _only(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """A copy of scores (B, vocabulary) with minus infinity wherever an id is not allowed."""
    if allowed is None:
        return scores.clone()
    return torch.full_like(scores, -torch.inf).index_copy(-1, allowed, scores[:, allowed])
