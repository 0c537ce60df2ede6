"""Data sets and codecs."""

from denoiselab.data.base import Data, Samples
from denoiselab.data.codec import Codec, Identity, Standardise
from denoiselab.data.digits import Digits
from denoiselab.data.folder import ImageFolder
from denoiselab.data.huggingface import HuggingFace
from denoiselab.data.images import ReadFromDisk
from denoiselab.data.points import EightGaussians
from denoiselab.data.shards import Shards
from denoiselab.data.small_images import CIFAR10, CIFAR100, MNIST, FashionMNIST
from denoiselab.data.source import BadSample, OnDisk, Pixels, Source
from denoiselab.data.stream import Stream

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "BadSample",
    "Codec",
    "Data",
    "Digits",
    "EightGaussians",
    "FashionMNIST",
    "HuggingFace",
    "Identity",
    "ImageFolder",
    "OnDisk",
    "Pixels",
    "ReadFromDisk",
    "Samples",
    "Shards",
    "Source",
    "Standardise",
    "Stream",
]
