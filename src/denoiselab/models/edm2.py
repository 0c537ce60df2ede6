"""EDM2's U-Net, whose activations, weights and updates keep their magnitudes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.buffers import ExactBuffers
from denoiselab.models.layers import beside, require, unmixed


class EDM2(nn.Module):
    """The magnitude-preserving U-Net (Karras et al. 2024, arXiv:2312.02696, configuration G, figure 21).

    Every layer gives unit variance from unit variance, in expectation over its weights: products whose output channels
    have weights w/|w| and no bias, SiLU over its gain, sums and concatenations with fixed shares, attention on
    normalised q, k and v. Nothing else is normalised but each pixel on the way down. Gradients are orthogonal to w and
    would lengthen it for ever, which lowers the learning rate. So at the start of every training call each |w|^2 is
    set to its number of weights, in place (equation 66); a learning rate then means the same in every layer at every
    time (0.01 in the paper, decayed as by lr_schedule=inverse_sqrt), and weight decay does next to nothing. An EMA is
    normalised as it is used, never in place. Under FSDP, only weights in units are kept at their length. The noise
    level comes as random Fourier features of c_noise, its own.

    Args:
        shape: one sample's shape (C, S, S).
        num_classes: 0 for no labels.
        vector: entries of a free conditioning vector, best of unit variance; 0 for none.
        low_res: channels of an image to be enlarged, which is made S x S bilinearly and set beside x; 0 for none.
        channels: width of the noise level's features, and the unit of the levels' widths, >= 1.
        multipliers: width of each level over channels; S must be divisible by 2^(levels - 1).
        blocks: residual blocks per level, >= 1.
        attention: sides at which blocks end with self-attention; the middle does unless there are none.
        head_channels: channels per head, a divisor of the widths that have attention.
        dropout: in [0, 1).
        outputs: tensors like x that it returns, stacked along the channels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        vector: int = 0,
        low_res: int = 0,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (16, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        outputs: int = 1,
    ):
        super().__init__()
        square = len(shape) == 3 and shape[1] == shape[2]
        require("shape", tuple(shape), square, "square images of shape (C, S, S); points want model=mlp")
        image_channels, _, side = shape
        require("channels", channels, channels >= 1, "at least 1")
        whole = len(multipliers) > 0 and all(isinstance(m, int) and m > 0 for m in multipliers)
        need = f"whole numbers > 0, one per level, with the images' side of {side} divisible by 2^(levels - 1)"
        require("multipliers", list(multipliers), whole and side % 2 ** (len(multipliers) - 1) == 0, need)
        sides = [side // 2**level for level in range(len(multipliers))]
        fit = all(a > 0 and math.log2(a / side).is_integer() for a in attention)
        require("attention", list(attention), fit, f"sides that are {side} times a power of 2; the levels have {sides}")
        require("blocks", blocks, blocks >= 1, "at least 1")
        require("dropout", dropout, 0 <= dropout < 1, "a probability in [0, 1)")
        widths, embedded = [channels * m for m in multipliers], channels * max(multipliers)
        fit = head_channels > 0 and all(w % head_channels == 0 for w in widths)
        require("head_channels", head_channels, fit or not attention, f"a divisor of each of the widths {widths}")

        self.low_res = low_res
        self.embedding = _Embedding(channels, embedded, num_classes, vector)
        self.first = _Product(image_channels + low_res + 1, widths[0], 3)

        def block(kind: str, c_in: int, c_out: int, attend: bool = False) -> _Block:
            return _Block(kind, c_in, c_out, embedded, c_out // head_channels if attend else 0, dropout)

        self.down, skips, c = nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            if level:
                self.down.append(block("halve", c, c))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block("down", c, width, side // 2**level in attention))
                c = width
                skips.append(c)

        self.up = nn.ModuleList([block("middle", c, c, bool(attention)), block("middle", c, c)])
        for level, width in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.up.append(block("double", c, c))
            for _ in range(blocks + 1):
                self.up.append(block("up", c + skips.pop(), width, side // 2**level in attention))
                c = width

        self.last = _Product(c, outputs * image_channels, 3)
        self.gain = nn.Parameter(torch.zeros(1))
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.normalise()

    @property
    def units(self) -> list[nn.Module]:
        """Its blocks in order: what is recomputed, compiled or sharded as one."""
        return [*self.down, *self.up]

    @torch.no_grad()
    def normalise(self) -> None:
        """w <- w sqrt(n)/|w| for the n weights of each output channel."""
        for module in self.modules():
            if isinstance(module, _Product | _Labels):  # data, so that the graph of an earlier call stays valid
                module.weight.data.copy_(normalised(module.weight, module.inputs))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.normalise()
        embedding = self.embedding(c_noise, label, vector)  # (B, channels max(multipliers))
        if self.low_res:
            x = beside(x, low_res)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # the ones are what a bias would be
        h = self.first(x.contiguous(memory_format=torch.channels_last))  # (B, channels, S, S)
        skips = [h]
        for block in self.down:
            h = block(h, embedding)
            skips.append(h)
        for block in self.up:
            h = block(joined(h, skips.pop()) if block.kind == "up" else h, embedding)
        return self.last(h, self.gain).contiguous()  # (B, outputs C, S, S)


class _Block(nn.Module):
    """mixed(x, W_2 silu((1 + gain V embedding) W_1 silu(x))), mixed with attention; x is normalised on the way down."""

    def __init__(self, kind: str, c_in: int, c_out: int, embedded: int, heads: int, dropout: float):
        super().__init__()
        self.kind, self.heads, self.encodes = kind, heads, kind in ("down", "halve")
        self.shortcut = _Product(c_in, c_out, 1) if c_in != c_out else None
        self.first = _Product(c_out if self.encodes else c_in, c_out, 3)
        self.modulation, self.gain = _Product(embedded, c_out), nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(dropout)
        self.second = _Product(c_out, c_out, 3)
        if heads:
            self.qkv, self.out = _Product(c_out, 3 * c_out, 1), _Product(c_out, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.kind == "halve":
            x = F.avg_pool2d(x, 2)
        if self.kind == "double":
            x = F.interpolate(x, scale_factor=2.0).to(x.dtype)
        skipped = x if self.shortcut is None else self.shortcut(x)
        if self.encodes:
            x = skipped = normalised(skipped, [1])
        scale = 1 + self.modulation(embedding, self.gain)[:, :, None, None]  # (B, c_out, 1, 1)
        h = self.second(self.dropout(silu(self.first(silu(x)) * scale)))
        h = mixed(skipped, h)  # (B, c_out, s, s)
        return mixed(h, self.attend(h)) if self.heads else h

    def attend(self, x: Tensor) -> Tensor:
        """Cosine attention: the entries of q, k and v have a mean square of 1."""
        qkv = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4)  # (B, 3, heads, N, C/heads)
        q, k, v = normalised(qkv, [4]).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
        return self.out(attended.transpose(2, 3).reshape(x.shape))


class _Product(nn.Module):
    """gain (w/|w|) x for the weights w of each output channel (equation 47): a matrix product, or a convolution."""

    def __init__(self, c_in: int, c_out: int, side: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, *[side, side] if side else []))
        self.inputs = [*range(1, self.weight.ndim)]

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = (normalised(self.weight, self.inputs) * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return F.linear(x, w) if x.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class _Labels(nn.Embedding):
    """_Product of one-hot labels times sqrt(number of labels): column by column of unit variance. -1 is the last."""

    inputs = (0,)

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(torch.where(input < 0, self.num_embeddings - 1, input), normalised(self.weight, self.inputs))


class _Fourier(ExactBuffers):
    """sqrt(2) cos(2 pi (f c_noise + phase)), f ~ N(0, 1), phase ~ U(0, 1) (equation 75), in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.frequency = nn.Buffer(torch.randn(channels, dtype=torch.float32))
        self.phase = nn.Buffer(torch.rand(channels, dtype=torch.float32))

    def forward(self, c_noise: Tensor) -> Tensor:
        turns = c_noise.float()[:, None] * self.frequency + self.phase
        return math.sqrt(2) * (2 * math.pi * turns).cos()


class _Embedding(nn.Module):
    """silu of the even sum of the noise level's features, the label's and the vector's; float32 under autocast too."""

    def __init__(self, channels: int, width: int, num_classes: int, vector: int):
        super().__init__()
        self.fourier, self.noise = _Fourier(channels), _Product(channels, width)
        self.label = _Labels(num_classes + 1, width) if num_classes else None
        self.vector = _Product(vector + 1, width) if vector else None  # of the vector and a 1, as a bias would be
        self.null_vector = nn.Parameter(torch.zeros(vector)) if vector else None

    def forward(self, c_noise: Tensor, label: Tensor | None, vector: Tensor | None) -> Tensor:
        with unmixed(c_noise.device.type):
            told = [self.noise(self.fourier(c_noise).to(self.noise.weight.dtype))]  # (B, width) each
            if self.label is not None:
                told.append(self.label(torch.full_like(c_noise, -1).long() if label is None else label))
            if self.vector is not None and self.null_vector is not None:
                value = self.null_vector.expand(len(c_noise), -1)
                value = value if vector is None else torch.where(vector.isnan(), value, vector.to(value.dtype))
                told.append(self.vector(F.pad(value, (0, 1), value=1.0)))
            return silu(torch.stack(told).sum(0) / math.sqrt(len(told)))


def normalised(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x over its root mean square along dims, which is taken in float32 at least and held above 1e-4."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x / (norm / math.sqrt(math.prod([x.shape[dim] for dim in dims]))).clamp_min(1e-4)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU over 0.596 = sqrt(E[SiLU(z)^2]), z ~ N(0, 1) (equation 81)."""
    return F.silu(x) / 0.596


def mixed(a: Tensor, b: Tensor, share: float = 0.3) -> Tensor:
    """((1 - share) a + share b)/sqrt((1 - share)^2 + share^2), b being a residual branch (equation 88)."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Their channels, each with half of the whole's variance, whatever their numbers n: a sqrt((n_a + n_b)/(2 n_a)) and
    b sqrt((n_a + n_b)/(2 n_b)) (equation 103 at equal shares)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale_a, scale_b = (math.sqrt((n_a + n_b) / (2 * n)) for n in (n_a, n_b))
    return torch.cat([scale_a * a, scale_b * b], dim=1)
