"""The diffusion transformer, for images and latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.buffers import ExactBuffers
from denoiselab.models.embedding import NoiseEmbedding
from denoiselab.models.layers import Conditioner, beside, require, zeroed

FEATURES = 256
"""Width of the noise level's features, the same for networks of every width."""

EPS = 1e-6
"""Of every norm, as published."""


class DiT(nn.Module):
    """h += gate_1 attention((1 + scale_1) norm(h) + shift_1), h += gate_2 mlp((1 + scale_2) norm(h) + shift_2), on
    patches: a transformer with adaLN-Zero (Peebles and Xie 2022, arXiv:2212.09748, section 3.2).

    Each block makes its scales, shifts and gates of SiLU(conditions) by a linear map that is zero at first, so a new
    block is the identity. Initialisation is the published code's. The switches are those of LightningDiT (Yao et al.
    2025, arXiv:2501.01423), whose code keeps the fixed positions beside the rotary ones.

    Args:
        shape: one sample's shape (C, H, W).
        num_classes: 0 for no labels.
        vector: entries of a free conditioning vector; 0 for none.
        low_res: channels of an image to be enlarged, which is made H x W bilinearly and set beside x; 0 for none.
        embedding: of the noise level; None for LogSNR.
        patch: side of a patch, which becomes one token; a divisor of H and W.
        width: of a token, a multiple of 4 and of heads.
        depth: number of blocks, >= 1.
        heads: of each attention.
        mlp_ratio: hidden width of the MLPs over width, > 0.
        qk_norm: queries and keys of a head are divided by their root mean square and times learned weights (Esser et
            al. 2024, arXiv:2403.03206).
        rope: queries and keys are rotated by their patch's row and column (Su et al. 2021, arXiv:2104.09864, on two
            axes).
        swiglu: the MLPs are W_3 (SiLU(W_1 h) * W_2 h) with 2/3 of the hidden width, which is as many parameters
            (Shazeer 2020, arXiv:2002.05202), in place of W_2 GELU(W_1 h).
        rms_norm: norms divide by the root mean square and do not subtract the mean (Zhang and Sennrich 2019,
            arXiv:1910.07467); they have no weights of their own, which 1 + scale has.
        mlp_eps: of the norms before MLPs, > 0; diffusers' are 1e-5.
        outputs: tensors like x that it returns, stacked along the channels.
    """

    positions: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        vector: int = 0,
        low_res: int = 0,
        embedding: NoiseEmbedding | None = None,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        rms_norm: bool = False,
        mlp_eps: float = EPS,
        outputs: int = 1,
    ):
        super().__init__()
        require("shape", tuple(shape), len(shape) == 3, "images of shape (C, H, W); points want model=mlp")
        channels, height, side = shape
        fit = patch >= 1 and height % patch == 0 and side % patch == 0
        require("patch", patch, fit, f"a divisor of the images' sides {height} and {side}")
        require("width", width, width >= 4 and width % 4 == 0, "a multiple of 4")
        require("depth", depth, depth >= 1, "at least 1")
        require("heads", heads, heads >= 1 and width % heads == 0, f"a divisor of width={width}")
        require("mlp_ratio", mlp_ratio, mlp_ratio * width >= 2, "a number > 0")
        require("mlp_eps", mlp_eps, mlp_eps > 0, "a number > 0")
        fit = not rope or width // heads % 4 == 0
        require("rope", rope, fit, f"width/heads to be a multiple of 4, and it is {width // heads}")

        self.shape, self.low_res, self.outputs = tuple(shape), low_res, outputs
        self.patch, self.grid, self.heads = patch, (height // patch, side // patch), heads
        self.mlp_ratio, self.mlp_eps = mlp_ratio, mlp_eps
        self.switches = {"qk_norm": qk_norm, "rope": rope, "swiglu": swiglu, "rms_norm": rms_norm}
        self.condition = Conditioner(FEATURES, width, num_classes, vector, embedding)
        self.first = nn.Linear((channels + low_res) * patch**2, width)
        self.register_buffer("positions", positions(*self.grid, width), persistent=False)  # (N, width)
        self.rotary = _Rotary(*self.grid, width // heads) if rope else None
        self.blocks = nn.ModuleList(
            _Block(
                width,
                _Attention(width, heads, qk_norm),
                (_SwiGLU if swiglu else _GELU)(width, int(mlp_ratio * width)),
                _norm(width, rms_norm, EPS),
                _norm(width, rms_norm, mlp_eps),
            )
            for _ in range(depth)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = _norm(width, rms_norm, EPS)
        self.last = nn.Linear(width, outputs * channels * patch**2)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in self.condition.mlp.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        if self.condition.label is not None:
            nn.init.normal_(self.condition.label.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (DiT, _Block)):
                zeroed(module.modulation)
        zeroed(self.last)

    @property
    def units(self) -> list[nn.Module]:
        """Its blocks in order: what is recomputed, compiled or sharded as one."""
        return list(self.blocks)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        condition = F.silu(self.condition(c_noise, label, vector))  # (B, width)
        if self.low_res:
            x = beside(x, low_res)
        (rows, columns), p = self.grid, self.patch
        patches = x.reshape(len(x), -1, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
        h = self.first(patches.flatten(3).flatten(1, 2)) + self.positions  # (B, N, width), N = rows columns
        for block in self.blocks:
            h = block(h, condition, self.rotary)
        shift, scale = _per_token(self.modulation(condition), h, 2)
        y = self.last(torch.addcmul(shift, self.norm(h), 1 + scale))  # (B, N, p p outputs C)
        y = y.view(len(x), rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B, outputs C, rows, p, columns, p)
        return y.reshape(len(x), -1, rows * p, columns * p).contiguous()


class _Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module, mlp: nn.Module, norm_1: nn.Module, norm_2: nn.Module):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.norm_1, self.attention = norm_1, attention
        self.norm_2, self.mlp = norm_2, mlp

    def forward(self, h: Tensor, condition: Tensor, rotary: _Rotary | None = None) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _per_token(self.modulation(condition), h, 6)
        inner = torch.addcmul(shift_1, self.norm_1(h), 1 + scale_1)  # (B, N, width), in one pass
        h = torch.addcmul(h, gate_1, self.attention(inner, rotary))
        inner = torch.addcmul(shift_2, self.norm_2(h), 1 + scale_2)
        return torch.addcmul(h, gate_2, self.mlp(inner))


class _Attention(nn.Module):
    """Multi-head self-attention over the patches."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = _HeadNorm(width // heads, EPS) if qk_norm else nn.Identity()
        self.k_norm = _HeadNorm(width // heads, EPS) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, rotary: _Rotary | None) -> Tensor:
        qkv = self.qkv(h).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D)
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))  # (B, heads, N, D) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, width)


class _HeadNorm(nn.RMSNorm):
    """In the type of its weight: under autocast queries and keys are narrower, and the fused kernel takes one type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)  # (B, heads, N, D)


class _Rotary(ExactBuffers):
    """(a, b) -> (a cos - b sin, b cos + a sin) of pairs of features, by angles row f_i and column f_i,
    f_i = 10000^(-4 i/D): scores then depend on differences of rows and of columns only.

    A quarter of the pairs' D features is a of the rows', the next a of the columns', then b of the rows' and of the
    columns'.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rows: int, columns: int, channels: int):
        super().__init__()
        angles = _places(rows, columns)[:, :, None] * _frequencies(channels // 4)  # (N, 2, D/4)
        self.register_buffer("cos", angles.flatten(1).cos(), persistent=False)  # (N, D/2)
        self.register_buffer("sin", angles.flatten(1).sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        (a, b), cos, sin = x.to(dtype).chunk(2, dim=-1), self.cos.to(dtype), self.sin.to(dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)  # (B, heads, N, D)


class _GELU(nn.Sequential):
    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))


class _SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        hidden = 2 * hidden // 3
        self.first, self.last = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, inner = self.first(h).chunk(2, dim=-1)
        return self.last(F.silu(gate) * inner)


def positions(rows: int, columns: int, width: int) -> Tensor:
    """[sin, cos] of column f_i, then of row f_i, f_i = 10000^(-4 i/width), of each patch: (N, width), row by row.

    The order is the published code's, in which columns come first.
    """
    places = _places(rows, columns).flip(1)
    angles = places[:, :, None] * _frequencies(width // 4)  # (N, 2, width/4)
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def _places(rows: int, columns: int) -> Tensor:
    """(row, column) of each patch, row by row: (N, 2)."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def _frequencies(count: int) -> Tensor:
    return 10_000.0 ** (-torch.arange(count, dtype=torch.float64) / count)


def _per_token(modulation: Tensor, h: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Its parts, each (B, 1, width); in the type of h, because 1 + scale in bfloat16 would be rounded to 0.4%."""
    return modulation.to(h.dtype)[:, None].chunk(parts, dim=-1)


def _norm(width: int, rms: bool, eps: float) -> nn.Module:
    kind = nn.RMSNorm if rms else nn.LayerNorm
    return kind(width, eps, elementwise_affine=False)
