"""Networks: ``net(x, c_noise, **cond) -> y``. They know nothing else of diffusion."""

from denoiselab.models.autoencoder import KL, VQ, Autoencoder
from denoiselab.models.dit import DiT
from denoiselab.models.edm2 import EDM2
from denoiselab.models.embedding import ADM, DDPM, Dead, LogSNR, NoiseEmbedding
from denoiselab.models.experts import Experts
from denoiselab.models.mlp import MLP
from denoiselab.models.unet import UNet

__all__ = [
    "ADM",
    "DDPM",
    "EDM2",
    "KL",
    "MLP",
    "VQ",
    "Autoencoder",
    "Dead",
    "DiT",
    "Experts",
    "LogSNR",
    "NoiseEmbedding",
    "UNet",
]
