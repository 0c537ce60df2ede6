"""Data sets and codecs."""

from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Codec, Identity, Latent, Standardise
from denoiselab.data.digits import Digits
from denoiselab.data.folder import ImageFolder
from denoiselab.data.huggingface import HuggingFace
from denoiselab.data.images import ReadFromDisk
from denoiselab.data.latents import Latents
from denoiselab.data.points import (
    Checkerboard,
    Circles,
    EightGaussians,
    Mixture,
    Moons,
    Pinwheel,
    Points,
    Rings,
    SwissRoll,
    TwoSpirals,
)
from denoiselab.data.shards import Shards
from denoiselab.data.small_images import CIFAR10, CIFAR100, MNIST, FashionMNIST
from denoiselab.data.source import BadSample, OnDisk, Pixels, Source
from denoiselab.data.stream import Stream
from denoiselab.data.super_resolution import SuperResolution

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "BadSample",
    "Checkerboard",
    "Circles",
    "Codec",
    "Data",
    "Digits",
    "EightGaussians",
    "FashionMNIST",
    "HuggingFace",
    "Identity",
    "ImageFolder",
    "Latent",
    "Latents",
    "Mixture",
    "Moons",
    "OnDisk",
    "Pinwheel",
    "Pixels",
    "Points",
    "ReadFromDisk",
    "Rings",
    "Samples",
    "Shards",
    "Source",
    "Standardise",
    "Stream",
    "SuperResolution",
    "SwissRoll",
    "TwoSpirals",
]
