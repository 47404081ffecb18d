"""Ring buffer of what the teacher made of earlier RoIs."""

from typing import Sequence

import torch
from torch import Tensor, nn

__all__ = ["QUEUE_DTYPES", "TeacherQueue"]

# names in configs
QUEUE_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class TeacherQueue(nn.Module):
    """The last ``size`` rows that were pushed; new ones take the place of the oldest.

    Buffers are on the device of the module and not part of checkpoints: 80 steps refill a queue of
    81920 rows after a resume. All ranks push the same rows, so their queues agree without being
    broadcast.
    """

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32):
        """
        Args:
            size: K, rows.
            dim: numbers per row.
            dtype: of the stored rows; fp16 holds values up to 65504.
        """
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype), persistent=False)
        self.pointer = 0
        self.count = 0
        self._in_use = False

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def valid(self) -> Tensor:
        """(count, dim), a view of the rows that have been pushed, in the order of the buffer."""
        return self.rows[: self.count]

    @torch.no_grad()
    def push(self, rows: Tensor, counts: Sequence[int], rank: int = 0) -> Tensor:
        """Store rows; return (counts[rank],) int64: where those of ``rank`` are now.

        Args:
            rows: (B, dim), of all ranks in order.
            counts: how many of them come from each rank.
            rank: that of this process.

        Raises:
            ValueError: more rows than the queue has.
        """
        number = len(rows)
        if number > self.size:
            raise ValueError(
                f"KD.GDETKD.CKD.QUEUE_SIZE is {self.size}, but one step of all ranks has {number} "
                "RoIs; it must be at least SOLVER.IMS_PER_BATCH times the RoIs of an image"
            )
        if self._in_use:
            self.rows = self.rows.clone()
            self._in_use = False
        columns = torch.arange(self.pointer, self.pointer + number, device=self.rows.device)
        columns %= self.size
        self.rows.index_copy_(0, columns, rows.detach().to(self.rows))
        self.pointer = (self.pointer + number) % self.size
        self.count = min(self.count + number, self.size)
        start = sum(counts[:rank])
        return columns[start : start + counts[rank]]

    def keep_for_backward(self, output: Tensor) -> None:
        """Keep what ``output`` was computed from until its gradient has been computed.

        Autograd holds ``valid`` without a copy. A push before the backward pass, as when gradients
        of several steps are accumulated, then goes to a copy of the buffer; otherwise autograd
        would refuse the changed rows.
        """
        self._in_use = True
        output.register_hook(self._release)

    def _release(self, gradient: Tensor) -> None:
        self._in_use = False

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.rows.shape[1]}, dtype={self.rows.dtype}"
