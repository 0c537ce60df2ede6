"""Autoencoders: between images and latents that are cheaper to diffuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.models.layers import require, unmixed, zeroed
from denoiselab.models.unet_blocks import Attention

EPS = 1e-6
"""Of every norm."""

LOG_VARIANCE = (-30.0, 20.0)
"""What the log-variance of a posterior is held in."""


class Autoencoder(nn.Module):
    """D(E(x)): a convolutional encoder to latents of a smaller side, and a decoder back (Rombach et al. 2021,
    arXiv:2112.10752, section 3.1 and appendix E.1).

    Residual blocks of two 3x3 convolutions on each level, a strided convolution between levels, and at the smallest
    side two more blocks around self-attention; the decoder is the mirror image. What lies between, and keeps latents
    from growing without bound, is a subclass's. It is trained on the squared error and the bottleneck's penalty alone,
    without the perceptual and adversarial losses of that paper, so its reconstructions are smoother.

    Args:
        shape: of an image, (C, H, W); H and W are multiples of f = 2^(levels - 1).
        latent: channels of a latent, whose sides are H/f and W/f.
        channels: width of the first level, a multiple of groups.
        multipliers: width of each level over channels.
        blocks: residual blocks of a level.
        groups: of each norm.
    """

    moments: int = 1
    """Tensors like a latent that the encoder returns."""

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 4,
        channels: int = 32,
        multipliers: Sequence[float] = (1, 2),
        blocks: int = 1,
        groups: int = 8,
    ):
        super().__init__()
        require("shape", tuple(shape), len(shape) == 3, "images of shape (C, H, W)")
        require("latent", latent, latent >= 1, "at least 1")
        require("blocks", blocks, blocks >= 1, "at least 1")
        require("groups", groups, groups >= 1, "at least 1")
        widths = [channels * m for m in multipliers]
        fit = len(widths) > 0 and all(w > 0 and w % groups == 0 for w in widths)
        need = f"numbers > 0, one per level, that give multiples of groups={groups} when times channels={channels}"
        require("multipliers", list(multipliers), fit, need)
        widths, factor = [int(w) for w in widths], 2 ** (len(widths) - 1)
        image, height, side = shape
        fit = height % factor == 0 and side % factor == 0
        require("multipliers", list(multipliers), fit, f"levels that divide {height} x {side} by 2 each but the first")

        self.shape, self.factor = tuple(shape), factor
        self.latent_shape = (latent, height // factor, side // factor)
        last = widths[-1]
        down: list[nn.Module] = [nn.Conv2d(image, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            if level:
                down.append(nn.Conv2d(before, before, 3, stride=2, padding=1))
            down += [_Residual(before if k == 0 else width, width, groups) for k in range(blocks)]
        down += _middle(last, groups)
        self.encoder = nn.Sequential(*down, *_end(last, self.moments * latent, groups))
        up: list[nn.Module] = [nn.Conv2d(latent, last, 3, padding=1), *_middle(last, groups)]
        for level, width in reversed(list(enumerate(widths))):
            after = widths[max(level - 1, 0)]
            up += [_Residual(width, width, groups) for _ in range(blocks)]
            if level:
                up += [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, after, 3, padding=1)]
        self.decoder = nn.Sequential(*up, *_end(widths[0], image, groups))
        zeroed(self.decoder[-1])

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean and the standard deviation of the latents of images (B, C, H, W), each (B, latent, H/f, W/f); no
        deviation where an image has one latent."""
        raise NotImplementedError

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a latent, not clamped."""
        return self.decoder(latent)

    def bottleneck(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder is given in training, random where the encoder's answer is a distribution, and what is added
        to the mean squared error, (B,)."""
        raise NotImplementedError

    def forward(
        self, image: Tensor, c_noise: Tensor | None = None, penalty: bool = False, **cond: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction of images; with ``penalty``, as training asks, that of the bottleneck's latent and its
        penalty. A noise level and conditions, which networks are called with, are not looked at."""
        if penalty:
            latent, added = self.bottleneck(image)
            return self.decoder(latent), added
        return self.decode(self.encode(image)[0])


class KL(Autoencoder):
    """E(x) is a Gaussian N(m, s^2), pulled towards N(0, 1): the penalty is w KL(N(m, s^2) || N(0, 1))/CHW, the KL in
    nats and summed over the latent (Kingma and Welling 2013, arXiv:1312.6114, eq. 10; Rombach et al. 2021,
    arXiv:2112.10752, appendix G, where w = 1e-6).

    Args:
        weight: w >= 0.
        shape, arguments: as for ``Autoencoder``.
    """

    moments = 2

    def __init__(self, shape: Sequence[int], *, weight: float = 1e-6, **arguments: Any):
        super().__init__(shape, **arguments)
        require("weight", weight, weight >= 0, "a number >= 0")
        self.weight = weight

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(image).chunk(2, dim=1)
        return mean, (log_variance.clamp(*LOG_VARIANCE) / 2).exp()

    def bottleneck(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.encode(image)
        mean, std = (moment.to(torch.promote_types(moment.dtype, torch.float32)) for moment in (mean, std))
        kl = (mean.square() + std.square() - 1).div(2).sub(std.log()).flatten(1).sum(1)  # (B,)
        latent = mean + std * torch.randn_like(mean) if self.training else mean
        return latent, self.weight * kl / image[0].numel()


class VQ(Autoencoder):
    """Each pixel of E(x) becomes the nearest of K learned codes e (van den Oord et al. 2017, arXiv:1711.00937, eq. 3):
    the penalty is |sg(z) - e|^2 + commitment |z - sg(e)|^2, means over the latent, and the decoder's gradient passes
    to z as it is.

    The latent that is diffused is z, before the code is looked up, which ``decode`` does (Rombach et al. 2021,
    arXiv:2112.10752, section 3.1). Codes start close to each other, uniform in [-1/K, 1/K], so that
    none is far from every z, never used, and never learned.

    Args:
        codes: K >= 2.
        commitment: >= 0.
        shape, arguments: as for ``Autoencoder``.
    """

    def __init__(self, shape: Sequence[int], *, codes: int = 256, commitment: float = 0.25, **arguments: Any):
        super().__init__(shape, **arguments)
        require("codes", codes, codes >= 2, "at least 2")
        require("commitment", commitment, commitment >= 0, "a number >= 0")
        self.commitment = commitment
        self.codes = nn.Embedding(codes, self.latent_shape[0])
        nn.init.uniform_(self.codes.weight, -1 / codes, 1 / codes)

    def encode(self, image: Tensor) -> tuple[Tensor, None]:
        return self.encoder(image), None

    def index(self, z: Tensor) -> Tensor:
        """The nearest code of each pixel of z (B, latent, h, w): (B, h, w)."""
        with unmixed(z.device.type):  # products in bfloat16 take another code for one in ten
            codes = self.codes.weight
            flat = z.to(torch.promote_types(codes.dtype, torch.float32)).movedim(1, -1)  # (B, h, w, latent)
            return (codes.square().sum(1) - 2 * flat @ codes.to(flat.dtype).t()).argmin(-1)

    def quantised(self, z: Tensor) -> Tensor:
        """The nearest codes, shaped like z."""
        return self.codes(self.index(z)).movedim(-1, 1)

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self.quantised(latent))

    def bottleneck(self, image: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(image)
        e = self.quantised(z)
        to_codes, to_z = (d.square().flatten(1).mean(1) for d in (z.detach() - e, z - e.detach()))  # (B,)
        return z + (e - z).detach(), to_codes + self.commitment * to_z


class _Residual(nn.Module):
    """x + W_2 SiLU(norm(W_1 SiLU(norm(x)))), W 3x3 convolutions."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(groups, c_in, EPS), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm_2, self.conv_2 = nn.GroupNorm(groups, c_out, EPS), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(h)))


def _middle(width: int, groups: int) -> list[nn.Module]:
    return [_Residual(width, width, groups), Attention(width, 1, groups, EPS), _Residual(width, width, groups)]


def _end(c_in: int, c_out: int, groups: int) -> list[nn.Module]:
    return [nn.GroupNorm(groups, c_in, EPS), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)]
