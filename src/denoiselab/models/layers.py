"""Parts that networks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab.models.embedding import LogSNR, NoiseEmbedding


class Conditioner(nn.Module):
    """The vector that conditions a network: MLP(features(c_noise)) + label token + W vector + b.

    It is computed in float32 under autocast too: it is small, and everything depends on it.

    Args:
        channels: width of the noise level's features, even, >= 4.
        width: width of the result.
        num_classes: labels 0..num_classes-1 and a learned null token for label -1; 0 for no labels.
        vector: entries of a free conditioning vector; those that are NaN are replaced by learned ones. 0 for none.
        embedding: of the noise level; None for LogSNR.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        num_classes: int = 0,
        vector: int = 0,
        embedding: NoiseEmbedding | None = None,
    ):
        super().__init__()
        require("channels", channels, channels >= 4 and channels % 2 == 0, "an even number >= 4")
        self.channels, self.num_classes = channels, num_classes
        self.embedding = embedding or LogSNR()
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.vector = nn.Linear(vector, width) if vector else None
        self.null_vector = nn.Parameter(torch.zeros(vector)) if vector else None

    def forward(self, c_noise: Tensor, label: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        with unmixed(c_noise.device.type):
            features = self.embedding(c_noise, self.channels)  # (B, channels), float32
            h = self.mlp(features.to(self.mlp[0].weight.dtype))  # (B, width)
            if self.label is not None:
                h = h + self._label(label)
            if self.vector is not None:
                h = h + self._vector(vector, len(c_noise))
            return h

    def _label(self, label: Tensor | None) -> Tensor:
        assert self.label is not None
        if label is None:
            return self.label.weight[self.num_classes]
        return self.label(torch.where(label < 0, self.num_classes, label))

    def _vector(self, vector: Tensor | None, n: int) -> Tensor:
        assert self.vector is not None
        assert self.null_vector is not None
        if vector is None:
            return self.vector(self.null_vector.expand(n, -1))
        return self.vector(torch.where(vector.isnan(), self.null_vector, vector.to(self.null_vector.dtype)))


def unmixed(device: str) -> torch.autocast:
    """A region without autocast, whatever the kind of device; meta, which has none, stands in the CPU's."""
    return torch.autocast(device if torch.amp.is_autocast_available(device) else "cpu", enabled=False)


def beside(x: Tensor, low_res: Tensor | None) -> Tensor:
    """The channels of x, then those of an image enlarged bilinearly to its sides (Saharia et al. 2021,
    arXiv:2104.07636, section 2.2): (B, C + low_res, H, W)."""
    assert low_res is not None, "this network enlarges an image: it needs low_res"
    return torch.cat([x, F.interpolate(low_res.to(x.dtype), x.shape[-2:], mode="bilinear")], dim=1)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with every parameter zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def require(name: str, value: object, ok: bool, need: str) -> None:
    """Raise the one-line error of a bad option unless ok."""
    if not ok:
        raise ValueError(f"{name}={value}: need {need}")
