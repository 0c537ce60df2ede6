"""Networks: ``net(x, c_noise, **cond) -> y``. They know nothing else of diffusion."""

from denoiselab.models.embedding import ADM, DDPM, Dead, LogSNR, NoiseEmbedding
from denoiselab.models.mlp import MLP
from denoiselab.models.unet import UNet

__all__ = ["ADM", "DDPM", "MLP", "Dead", "LogSNR", "NoiseEmbedding", "UNet"]
