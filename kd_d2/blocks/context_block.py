"""Global context block: relations between the positions of a map."""

from torch import Tensor, nn

__all__ = ["ContextBlock"]


class ContextBlock(nn.Module):
    """R(F) = F + W2 ReLU(LN(W1 sum_p softmax_p(w F) F_p)), as FGD uses it (GcBlock).

    One vector per image and channel is added to all positions. W2 starts at 0, hence R at the
    identity; the rest is initialised as PyTorch does. 66 433 parameters at 256 channels.
    """

    def __init__(self, channels: int):
        """``channels``: of the map, at least 2; W1 halves them."""
        super().__init__()
        self.key = nn.Conv2d(channels, 1, 1)
        self.change = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )
        nn.init.zeros_(self.change[-1].weight)
        nn.init.zeros_(self.change[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) from (N, C, H, W)."""
        share = self.key(x).flatten(2).softmax(dim=2)  # (N, 1, HW)
        context = x.flatten(2) @ share.transpose(1, 2)  # (N, C, 1)
        return x + self.change(context.unsqueeze(3))
