"""What a recipe does to the distribution over the next token, in float64 throughout.

In float32 a log-softmax over fifty thousand tokens is off by 1e-6, and that is as much as int8 changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from awq_pycuda.results.evaluation_record import OfTokens

_BLOCK = 1 << 18  # numbers of a block of rows: in float64 they stay in a core's cache, which halves the time


class Original:
    """The original's distributions at the predicted tokens of a window.

    Args:
        logits: (tokens, vocabulary) float32 of the original.
        ids: (tokens,) int64, the tokens that the text has there.
    """

    def __init__(self, logits: Any, ids: Any) -> None:
        self._logits = logits
        self._ids = ids.to(logits.device)
        self._likeliest = logits.argmax(1)
        self._lse = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        for rows in _blocks(logits):
            self._lse[rows], _ = _exponentials(logits[rows])

    def against(self, logits: Any) -> OfTokens:
        """A recipe's logits, (tokens, vocabulary) float32, beside them."""
        kl, kl_reverse, nll = (torch.empty_like(self._lse) for _ in range(3))
        for rows in _blocks(logits):
            lse, q = _exponentials(logits[rows])
            shift = self._lse[rows] - lse
            p = self._logits[rows].double()
            # Of log P - log Q what differs from token to token of the vocabulary.
            difference = p - logits[rows].double()
            q.mul_(difference)
            kl_reverse[rows] = shift - q.sum(1)
            p.sub_(self._lse[rows, None]).exp_().mul_(difference)
            kl[rows] = p.sum(1) - shift
            nll[rows] = lse - logits[rows].gather(1, self._ids[rows, None])[:, 0].double()
        return OfTokens(*(each.cpu().numpy() for each in (kl, kl_reverse, nll, logits.argmax(1) == self._likeliest)))


def _blocks(logits: Any) -> Iterator[slice]:
    step = max(1, _BLOCK // logits.shape[1])
    yield from (slice(start, start + step) for start in range(0, len(logits), step))


def _exponentials(logits: Any) -> tuple[Any, Any]:
    """(rows,) log of the sum of exponentials, and (rows, vocabulary) the shares of each, in float64."""
    shifted = logits.double()
    largest = shifted.amax(1, keepdim=True)
    shares = shifted.sub_(largest).exp_()
    total = shares.sum(1, keepdim=True)
    return (largest + total.log())[:, 0], shares.div_(total)
