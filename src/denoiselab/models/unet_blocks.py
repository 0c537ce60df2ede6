"""What the U-Net is made of: residual blocks, self-attention, and layers that change the side."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.models.layers import zeroed


class Block(nn.Module):
    """x + W_2 SiLU(norm(W_1 SiLU(norm(x)) told of the noise level)), W 3x3 convolutions; then attention.

    It is told by a shift before the second norm (Ho et al. 2020, arXiv:2006.11239, appendix B) or by a scale and a
    shift after it, (1 + scale) norm(h) + shift (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3). With a factor,
    both x and the input of W_1 are resampled first, as in Dhariwal and Nichol 2021 (arXiv:2105.05233, section 3).

    Args:
        c_in: channels of x.
        c_out: channels of the result; if they differ, x goes through a 1x1 convolution.
        width: of the conditioning vector, which comes with its SiLU applied.
        groups: of the norms.
        eps: of the norms.
        scale_shift: scale and shift, or a shift alone.
        dropout: before W_2.
        factor: 0.5, 1 or 2, the side of the result over that of x.
        attention: what follows; None for nothing.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        width: int,
        groups: int,
        eps: float,
        scale_shift: bool,
        dropout: float,
        factor: float = 1,
        attention: Attention | None = None,
    ):
        super().__init__()
        self.scale_shift, self.factor = scale_shift, factor
        self.norm_1, self.conv_1 = nn.GroupNorm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * c_out if scale_shift else c_out)
        self.norm_2, self.conv_2 = nn.GroupNorm(groups, c_out, eps), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = attention or nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        told = self.modulation(embedding)[:, :, None, None]  # (B, c_out or 2 c_out, 1, 1)
        h = self.conv_1(resampled(F.silu(self.norm_1(x)), self.factor))  # (B, c_out, s, s)
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + told)
        h = self.conv_2(self.dropout(F.silu(h)))
        return self.attention(self.shortcut(resampled(x, self.factor)) + h)


class Attention(nn.Module):
    """x + W softmax(q k^T / sqrt(d)) v over the pixels, q, k and v of norm(x), in heads of d channels.

    Args:
        channels: of x.
        heads: a divisor of channels.
        groups: of the norm.
        eps: of the norm.
    """

    def __init__(self, channels: int, heads: int, groups: int, eps: float):
        super().__init__()
        self.heads, self.head_channels = heads, channels // heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # (B, N, C)
        qkv = self.qkv(tokens).view(batch, -1, 3, self.heads, self.head_channels)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        return x + self.out(attended).view(batch, height, width, channels).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Half the side by a 3x3 convolution with stride 2, or twice the side by one after each pixel is doubled.

    Args:
        channels: of x and of the result.
        factor: 0.5 or 2.
        pad_after: the strided convolution sees zeros only below and to the right of x, as in the TensorFlow code of
            DDPM, and not all around it.
    """

    def __init__(self, channels: int, factor: float, pad_after: bool = False):
        super().__init__()
        self.factor, self.pad_after = factor, pad_after and factor < 1
        stride, padding = (2, 0 if pad_after else 1) if factor < 1 else (1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.factor > 1:
            x = resampled(x, self.factor)
        elif self.pad_after:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


def resampled(x: Tensor, factor: float) -> Tensor:
    """Means of 2x2 pixels (0.5), x itself (1), or each pixel doubled (2)."""
    if factor == 1:
        return x
    return F.avg_pool2d(x, 2) if factor < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")
