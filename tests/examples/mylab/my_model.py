"""A network of one's own."""

from collections.abc import Sequence

from torch import Tensor, nn

from denoiselab.models.layers import Conditioner


class TinyConv(nn.Module):
    """Two convolutions, with the embedding of noise level and label added between them.

    Args:
        shape: one sample's shape, (C, H, W).
        num_classes: 0 for no labels.
        width: channels between the convolutions, >= 1.
    """

    def __init__(self, shape: Sequence[int], num_classes: int = 0, width: int = 32):
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}: need at least 1")
        self.condition = Conditioner(32, width, num_classes)
        self.first = nn.Conv2d(shape[0], width, 3, padding=1)
        self.last = nn.Conv2d(width, shape[0], 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.first(x) + self.condition(c_noise, label)[:, :, None, None]  # (B, width, H, W)
        return self.last(nn.functional.silu(h))  # (B, C, H, W)
