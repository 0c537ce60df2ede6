"""The U-Net of DDPM and ADM, for square images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.models.embedding import NoiseEmbedding
from denoiselab.models.layers import Conditioner, require, zeroed


class UNet(nn.Module):
    """Residual blocks with scale-shift conditioning, self-attention at chosen resolutions and skip connections
    (Ho et al. 2020, arXiv:2006.11239, appendix B; Dhariwal and Nichol 2021, arXiv:2105.05233, section 3).

    Args:
        shape: one sample's shape (C, S, S).
        num_classes: 0 for no labels.
        vector: entries of a free conditioning vector; 0 for none.
        embedding: of the noise level; None for LogSNR.
        channels: width of the first level, a multiple of 32.
        multipliers: width of each level over channels; each level halves the side, so S must be divisible by
            2^(levels - 1).
        blocks: residual blocks per level, >= 1.
        attention: sides at which blocks are followed by self-attention.
        head_channels: channels per attention head.
        dropout: in [0, 1).
        outputs: tensors like x that it returns, stacked along the channels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        vector: int = 0,
        embedding: NoiseEmbedding | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (4,),
        head_channels: int = 32,
        dropout: float = 0.1,
        outputs: int = 1,
    ):
        super().__init__()
        require("shape", tuple(shape), len(shape) == 3, "images of shape (C, S, S); points want model=mlp")
        image_channels, height, side = shape
        whole = len(multipliers) > 0 and all(isinstance(m, int) and m > 0 for m in multipliers)
        require("multipliers", list(multipliers), whole, "whole numbers > 0, one per level")
        halvings = 2 ** (len(multipliers) - 1)
        require("shape", tuple(shape), height == side, "a square image; crop or resize the data")
        require("channels", channels, channels > 0 and channels % 32 == 0, "a multiple of 32")
        require("blocks", blocks, blocks >= 1, "at least 1")
        require("dropout", dropout, 0 <= dropout < 1, "a probability in [0, 1)")
        if side % halvings:
            raise ValueError(
                f"multipliers={list(multipliers)}: {len(multipliers)} levels need a side divisible by {halvings}, "
                f"the images have {side}"
            )

        width = 4 * channels
        self.condition = Conditioner(channels, width, num_classes, vector, embedding)
        self.first = nn.Conv2d(image_channels, channels, 3, padding=1)

        def block(c_in: int, c_out: int) -> nn.Module:
            attend = _Attention(c_out, head_channels) if side in attention else nn.Identity()
            return _Block(c_in, c_out, width, dropout, attend)

        self.down, skips, c = nn.ModuleList(), [channels], channels
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(block(c, channels * multiplier))
                c = channels * multiplier
                skips.append(c)
            if level < len(multipliers) - 1:
                self.down.append(_Resample(nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)
                side //= 2

        self.middle = nn.ModuleList([block(c, c), block(c, c)])

        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), channels * multiplier))
                c = channels * multiplier
            if level:
                self.up.append(_Resample(nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(c, c, 3, padding=1))))
                side *= 2

        self.last = nn.Sequential(_norm(c), nn.SiLU(), zeroed(nn.Conv2d(c, outputs * image_channels, 3, padding=1)))
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        embedding = F.silu(self.condition(c_noise, label, vector))  # (B, 4 channels)
        h = self.first(x.contiguous(memory_format=torch.channels_last))  # (B, channels, S, S)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if isinstance(layer, _Block):
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        return self.last(h).contiguous()  # (B, outputs C, S, S)


def _norm(channels: int) -> nn.GroupNorm:
    """32 groups of at least 4 channels: with one channel each, a block could not see its channels' means."""
    return nn.GroupNorm(min(32, channels // 4), channels)


class _Block(nn.Module):
    """norm, SiLU, conv, scale-shift norm, SiLU, dropout, zero conv; plus the input; then attention."""

    def __init__(self, c_in: int, c_out: int, width: int, dropout: float, attention: nn.Module):
        super().__init__()
        self.norm_1, self.conv_1 = _norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * c_out)
        self.norm_2, self.conv_2 = _norm(c_out), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = F.silu(self.norm_2(h) * (1 + scale) + shift)
        h = self.conv_2(self.dropout(h))
        return self.attention(self.shortcut(x) + h)


class _Attention(nn.Module):
    """Multi-head self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        require(
            "head_channels",
            head_channels,
            head_channels > 0 and channels % head_channels == 0,
            f"a divisor of the width {channels}",
        )
        self.heads = channels // head_channels
        self.norm = _norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # (B, N, C)
        qkv = self.qkv(tokens).view(batch, -1, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, C/heads) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, channels)
        return x + self.out(attended).view(batch, height, width, channels).permute(0, 3, 1, 2)


class _Resample(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.layer(x)
