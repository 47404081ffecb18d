"""InfoNCE over many negatives, in bounded memory."""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_d2.losses.precision import full_precision

__all__ = ["InfoNCE", "info_nce"]


class InfoNCE(NamedTuple):
    """Result of one batch, scalars but for ``correct``.

    Attributes:
        loss: mean over the queries; 0, connected to them, without any.
        accuracy: share of the queries that are closer to their positive than to any allowed
            negative.
        positive_cosine: mean inner product of query and positive.
        valid_negatives: mean number of allowed negatives of a query.
        correct: (N,) bool, the queries that ``accuracy`` counts.
    """

    loss: Tensor
    accuracy: Tensor
    positive_cosine: Tensor
    valid_negatives: Tensor
    correct: Tensor


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    temperature: float,
    allowed: Optional[Tensor] = None,
    columns: Optional[Tensor] = None,
    chunk: int = 0,
) -> InfoNCE:
    """Mean of -log(e^(q.p/t) / (e^(q.p/t) + sum_j e^(q.n_j/t))): eq. 2 of the G-DetKD paper.

    A query without any allowed negative gives exactly 0 and no gradient. All arguments may carry
    gradients.

    Args:
        queries, positives: (N, D) unit vectors, row by row a pair.
        negatives: (M, D) unit vectors, common to all queries.
        temperature: t, positive.
        allowed: (N, B) bool, False: this negative is none of this query. None: all are.
        columns: (B,) int64, the rows of ``negatives``, each at most once, that the columns of
            ``allowed`` stand for; negatives not named are allowed. None: B = M, all of them.
        chunk: so many queries at a time, whose similarities are computed a second time in the
            backward pass instead of being kept: (chunk, M) instead of (N, M) numbers. 0: off.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, positives, negatives = map(full_precision, (queries, positives, negatives))
        num_queries, num_negatives = len(queries), len(negatives)
        if allowed is None:
            allowed = queries.new_zeros((num_queries, 0), dtype=torch.bool)
            columns = torch.zeros(0, dtype=torch.int64, device=queries.device)
        elif columns is None:
            columns = torch.arange(num_negatives, device=queries.device)
        rows = chunk if 0 < chunk < num_queries else max(num_queries, 1)
        parts = []
        for part in zip(queries.split(rows), positives.split(rows), allowed.split(rows)):
            arguments = (*part, negatives, columns, temperature)
            if rows < num_queries and torch.is_grad_enabled():
                result = checkpoint(
                    _row_losses, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                result = _row_losses(*arguments)
            parts.append(result)
        losses, cosines, correct = (torch.cat(x) for x in zip(*parts))
        divisor = max(num_queries, 1)
        excluded = (~allowed).sum() / divisor
        return InfoNCE(
            loss=losses.sum() / divisor,
            accuracy=correct.sum() / divisor,
            positive_cosine=cosines.detach().sum() / divisor,
            valid_negatives=num_negatives - excluded,
            correct=correct,
        )


def _row_losses(
    queries: Tensor,
    positives: Tensor,
    allowed: Tensor,
    negatives: Tensor,
    columns: Tensor,
    temperature: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Loss, cosine of the pair and whether it is ahead of all negatives, (n,) each."""
    queries = queries / temperature
    positive = (queries * positives).sum(dim=1, keepdim=True)
    logits = queries @ negatives.t()
    penalty = torch.zeros_like(allowed, dtype=logits.dtype).masked_fill_(~allowed, -torch.inf)
    logits = logits.index_add_(1, columns, penalty)
    # the positive in front: without it, a row of nothing but -inf has NaN as its gradient
    joined = torch.cat([positive, logits], dim=1)
    losses = joined.logsumexp(dim=1) - positive[:, 0]
    correct = (logits.detach() < positive.detach()).all(dim=1)
    return losses, positive[:, 0] * temperature, correct
