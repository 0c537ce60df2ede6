"""The U-Net of DDPM and ADM, for square images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.models.embedding import NoiseEmbedding
from denoiselab.models.layers import Conditioner, beside, require, zeroed
from denoiselab.models.unet_blocks import Attention, Block, Resample

RESAMPLING = ("conv", "conv_after", "residual")


class UNet(nn.Module):
    """Residual blocks told of the noise level, self-attention at chosen sides, and skip connections
    (Ho et al. 2020, arXiv:2006.11239, appendix B; Dhariwal and Nichol 2021, arXiv:2105.05233, section 3).

    On the way down each level has ``blocks`` blocks and then halves the side; the middle is block, attention, block;
    on the way up each level has ``blocks`` + 1 blocks, which also see what a layer of the way down gave, and then
    doubles the side.

    DDPM's network is resample=conv_after, scale_shift=false, eps=1e-6 with one head, ADM's is resample=residual with
    head_channels=64.

    Args:
        shape: one sample's shape (C, S, S).
        num_classes: 0 for no labels.
        vector: entries of a free conditioning vector; 0 for none.
        low_res: channels of an image to be enlarged, which is made S x S bilinearly and set beside x; 0 for none.
        embedding: of the noise level; None for LogSNR.
        channels: width of the noise level's features, and the unit of the levels' widths; even, >= 4.
        multipliers: width of each level over channels; S must be divisible by 2^(levels - 1).
        blocks: residual blocks per level, >= 1.
        attention: sides at which blocks are followed by self-attention, each S times a power of 2. One that no level
            has is of no effect, so that an option can serve images of several sizes.
        heads: of each attention.
        head_channels: channels per head, in place of a number of heads.
        resample: how the side changes; "conv": a convolution with stride 2, and doubled pixels before a convolution;
            "conv_after": the same, with padding only after the image as in DDPM's code; "residual": means of 2x2
            pixels and doubled pixels inside of a residual block.
        scale_shift: blocks are told of the noise level by a scale and a shift, or by a shift alone.
        groups: of the norms, a divisor of every width. With one channel in each, a block cannot see the means of its
            channels, and a shift alone tells it nothing.
        eps: of the norms, > 0.
        dropout: in [0, 1).
        outputs: tensors like x that it returns, stacked along the channels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        vector: int = 0,
        low_res: int = 0,
        embedding: NoiseEmbedding | None = None,
        channels: int = 64,
        multipliers: Sequence[float] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        head_channels: int | None = None,
        resample: str = "conv",
        scale_shift: bool = True,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        outputs: int = 1,
    ):
        super().__init__()
        require("shape", tuple(shape), len(shape) == 3, "images of shape (C, S, S); points want model=mlp")
        image_channels, height, side = shape
        require("shape", tuple(shape), height == side, "a square image; crop or resize the data")
        require("channels", channels, channels >= 4 and channels % 2 == 0, "an even number >= 4")
        require("groups", groups, groups >= 1, "at least 1")
        widths = [channels * m for m in multipliers]
        fit = len(widths) > 0 and all(w > 0 and w % groups == 0 for w in widths)
        whole = len(widths) > 0 and all(m > 0 and float(m).is_integer() for m in multipliers)
        require("channels", channels, fit or not whole, f"a multiple of groups={groups}")
        need = f"numbers > 0, one per level, that give multiples of groups={groups} when times channels={channels}"
        require("multipliers", list(multipliers), fit, need)
        widths, halvings = [int(w) for w in widths], 2 ** (len(widths) - 1)
        if side % halvings:
            raise ValueError(
                f"multipliers={list(multipliers)}: {len(widths)} levels need a side divisible by {halvings}, "
                f"the images have {side}"
            )
        sides = [side // 2**level for level in range(len(widths))]
        fit = all(a > 0 and math.log2(a / side).is_integer() for a in attention)
        require("attention", list(attention), fit, f"sides that are {side} times a power of 2; the levels have {sides}")
        require("blocks", blocks, blocks >= 1, "at least 1")
        require("resample", resample, resample in RESAMPLING, f"one of {', '.join(RESAMPLING)}")
        require("eps", eps, eps > 0, "a number > 0")
        require("dropout", dropout, 0 <= dropout < 1, "a probability in [0, 1)")

        self.shape, self.low_res = tuple(shape), low_res
        self.widths, self.blocks, self.resample = widths, blocks, resample
        self.attends = [s in attention for s in sides]

        self.condition = Conditioner(channels, 4 * channels, num_classes, vector, embedding)
        self.first = nn.Conv2d(image_channels + low_res, widths[0], 3, padding=1)
        block = partial(Block, width=4 * channels, groups=groups, eps=eps, scale_shift=scale_shift, dropout=dropout)

        def attend(c: int) -> Attention:
            return Attention(c, number_of_heads(c, heads, head_channels), groups, eps)

        def resampler(c: int, factor: float) -> nn.Module:
            if resample == "residual":
                return block(c, c, factor=factor)
            return Resample(c, factor, pad_after=resample == "conv_after")

        self.down, skips, c = nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(c, width, attention=attend(width) if self.attends[level] else None))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.down.append(resampler(c, 0.5))
                skips.append(c)

        self.middle = nn.ModuleList([block(c, c, attention=attend(c)), block(c, c)])

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), width, attention=attend(width) if self.attends[level] else None))
                c = width
            if level:
                self.up.append(resampler(c, 2))

        last = zeroed(nn.Conv2d(c, outputs * image_channels, 3, padding=1))
        self.last = nn.Sequential(nn.GroupNorm(groups, c, eps), nn.SiLU(), last)

    @property
    def units(self) -> list[nn.Module]:
        """Its blocks in order: what is recomputed, compiled or sharded as one."""
        return [*self.down, *self.middle, *self.up]

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        embedding = F.silu(self.condition(c_noise, label, vector))  # (B, 4 channels)
        if self.low_res:
            x = beside(x, low_res)
        # cuDNN is faster with channels last; oneDNN is not, and its sums are less exact there.
        x = x.contiguous(memory_format=torch.channels_last if x.is_cuda else torch.contiguous_format)
        h = self.first(x)  # (B, widths[0], S, S)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if layer.factor == 1:
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        return self.last(h).contiguous()  # (B, outputs C, S, S)


def number_of_heads(c: int, heads: int, head_channels: int | None) -> int:
    """Of an attention over c channels."""
    if head_channels is None:
        require("heads", heads, heads > 0 and c % heads == 0, f"a divisor of the width {c}")
        return heads
    require("heads", heads, heads == 1, f"1 where head_channels={head_channels} is given")
    require("head_channels", head_channels, head_channels > 0 and c % head_channels == 0, f"a divisor of the width {c}")
    return c // head_channels
