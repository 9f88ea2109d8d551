"""Which form of attention runs, and why."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backend import Backend, capability, resolve_backend
from . import chunked
from .biases import Bias, BiasTerms, Disentangled, bias_values
from .function import Form
from .masks import Mask

FormName = Literal["sdpa_full", "sdpa_causal", "sdpa_cudnn", "sdpa_flash", "sdpa_mask", "chunked", "triton"]

# On a CPU torch's fused attention with the mask in memory beats the chunked form up to about this many pairs of query
# and key (benchmarks/attention_cpu.py), and never may that mask be large: memory stays linear in length.
MASK_PAIRS = 256 * 256
MASK_BYTES = 2**24
# cuDNN's kernel is for long sequences of queries; decoding is flash attention's.
CUDNN_QUERIES = 64

_log = logging.getLogger("potamos.kernels.attention")


@dataclass(frozen=True)
class Decision:
    """Which form `attention` runs and why.

    "sdpa_causal", "sdpa_full": torch's fused attention on the CPU with its own causal mask, or none; "sdpa_cudnn",
    "sdpa_flash": the same on CUDA by cuDNN or by FlashAttention; "sdpa_mask": with a small mask and bias in memory;
    "chunked": tiles in plain torch; "triton": this package's kernels.
    """

    form: FormName
    reason: str


def decide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Bias | None,
    dropout: float,
    return_lse: bool,
    backend: Backend,
) -> Decision:
    """The form for these arguments; raises BackendUnavailableError for backend="triton" where it cannot run."""
    chosen = resolve_backend(backend, "attention", q, obstacle=obstacle(q, v))
    plain, special = _plain(q, k, mask, bias, dropout, return_lse)
    if backend != "triton" and plain is not None and (fused := _fused(q, k, v, plain)) is not None:
        return fused
    if chosen == "triton":
        return Decision("triton", "asked for" if backend == "triton" else f"{special}: a case for the Triton kernels")
    if q.is_cuda:
        return Decision("chunked", f"{special or 'not a case of the fused kernels'}; the Triton kernels are not used")
    size = _mask_bytes(q, k, mask, bias)
    if dropout == 0 and not return_lse and q.shape[2] * k.shape[2] <= MASK_PAIRS and size <= MASK_BYTES:
        return Decision("sdpa_mask", f"{special}, and small: in memory the mask is fastest")
    return Decision("chunked", f"{special}: tile by tile, memory linear in length")


def obstacle(q: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot take these shapes, in words that follow "backend='triton' ", or None."""
    if q.shape[3] != v.shape[3]:
        return f"needs values of the queries' dimension, {q.shape[3]}, not {v.shape[3]}"
    if q.shape[3] > 256:
        return f"takes head dimensions up to 256, not {q.shape[3]}"
    return None


def announce(decision: Decision) -> None:
    """Log a decision the first time that it is taken; a compiler that traces cannot."""
    if not torch.compiler.is_compiling():
        _announce(decision.form, decision.reason)


def form_of(decision: Decision) -> Form:
    """The module behind "chunked" or "triton"."""
    if decision.form == "triton":
        from . import triton_form  # when first needed: the kernels need the triton package

        return cast(Form, triton_form)
    assert decision.form == "chunked"
    return cast(Form, chunked)


def run_fused(
    decision: Decision, q: Tensor, k: Tensor, v: Tensor, mask: Mask, terms: BiasTerms, scale: float
) -> Tensor:
    """torch's fused attention, in the way that was decided."""
    grouped = q.shape[1] != k.shape[1]
    if decision.form == "sdpa_mask":
        return _with_mask(q, k, v, mask, terms, scale, grouped)
    # A causal mask may hide nothing: one query after all keys.
    causal = mask.causal and not mask.hides_nothing(q.shape[2], k.shape[2])
    if q.is_cuda:
        wanted = SDPBackend.CUDNN_ATTENTION if decision.form == "sdpa_cudnn" else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(wanted):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    # With strided channels torch would write the scores out.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


@functools.cache
def _announce(form: str, reason: str) -> None:
    _log.info("attention runs as %s: %s", form, reason)


def _plain(
    q: Tensor, k: Tensor, mask: Mask, bias: Bias | None, dropout: float, return_lse: bool
) -> tuple[Literal["full", "causal"] | None, str]:
    """The case that torch's fused kernels know, if it is one; otherwise what is special."""
    if dropout > 0:
        return None, "dropout uses the counter-based mask"
    if return_lse:
        return None, "torch's fused attention does not return the log-sum-exp"
    if bias is not None:
        return None, "a bias is added to the scores"
    if mask.hides_nothing(q.shape[2], k.shape[2]):
        return "full", "every query sees every key"
    if mask.is_plain_causal():
        return "causal", "plain causal: query i sees keys 0..i"
    return None, "documents, a window, blocks, a layout, a prefix or an offset hide keys"


def _fused(q: Tensor, k: Tensor, v: Tensor, plain: Literal["full", "causal"]) -> Decision | None:
    """The fastest of torch's kernels for a plain case; None where it would write the scores out or is no faster."""
    reason = {"full": "every query sees every key", "causal": "plain causal: query i sees keys 0..i"}[plain]
    if not q.is_cuda:
        if q.shape[3] != v.shape[3]:
            return None  # torch would fall back to the form that writes the scores out
        return Decision("sdpa_full" if plain == "full" else "sdpa_causal", reason)
    if plain == "causal" and q.shape[2] != k.shape[2]:
        return None
    cudnn, flash = _libraries(q, k, v, causal=plain == "causal")
    if cudnn and q.shape[2] >= CUDNN_QUERIES and capability(q.device) >= (9, 0):
        return Decision("sdpa_cudnn", reason)
    return Decision("sdpa_flash", reason) if flash else None


def _libraries(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[bool, bool]:
    """Whether torch's cuDNN and FlashAttention kernels take these inputs."""
    grouped = q.shape[1] != k.shape[1]
    if torch.compiler.is_compiling():  # torch's own answer cannot be traced; these shapes they always take
        half = q.dtype in (torch.float16, torch.bfloat16) and 1 == q.stride(3) == k.stride(3) == v.stride(3)
        usual = half and q.shape[3] == v.shape[3] and q.shape[3] <= 128 and q.shape[3] % 8 == 0
        return usual and not grouped, usual
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, grouped)
    return torch.backends.cuda.can_use_cudnn_attention(params), torch.backends.cuda.can_use_flash_attention(params)


def _mask_bytes(q: Tensor, k: Tensor, mask: Mask, bias: Bias | None) -> int:
    """The memory of mask and bias as torch's fused attention takes them."""
    by_sample = mask.query_documents is not None or mask.query_positions is not None or isinstance(mask.prefix, Tensor)
    by_sample = by_sample or isinstance(bias, Disentangled)
    by_head = bias is not None or (mask.layout is not None and len(mask.layout.counts) > 1)
    tables = (q.shape[0] if by_sample else 1) * (q.shape[1] if by_head else 1)
    return tables * q.shape[2] * k.shape[2] * max(4, q.element_size())


def _with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Mask, terms: BiasTerms, scale: float, grouped: bool) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    visible = mask.visible(queries, keys, q.device)
    # A row without a key would be NaN in some of torch's forms: let it see everything, then blank it.
    blank = ~visible.any(-1, keepdim=True)
    allowed = visible | blank
    if not terms.empty:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows, columns = (torch.arange(n, device=q.device) for n in (queries, keys))
        scores = bias_values(terms, rows + mask.query_offset, columns + mask.key_offset, wide)
        # torch takes a mask of fp32 beside half-precision queries: the bias is not rounded.
        allowed = torch.where(allowed, scores, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped)
    return torch.where(blank, 0, out)
