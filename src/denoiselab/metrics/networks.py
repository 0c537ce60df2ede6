"""Networks of others whose features distances are measured in: Inception of the standard FID, and torchvision's."""

from __future__ import annotations

import io
import pickle
import urllib.error
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from denoiselab import checkpoint
from denoiselab.metrics.features import Features

STANDARD = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""The sha256 of Inception's weights of 2015-12-05 for PyTorch, which published FIDs are measured with."""

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels in [0, 1], which torchvision's networks take away and divide by."""

DOWNLOAD = "download"


class Inception(Features):
    """The 2,048 pooled features of Inception v3 (Szegedy et al. 2016, arXiv:1512.00567) in the version that FID was
    defined with (Heusel et al. 2017, arXiv:1706.08500), as torchmetrics runs it; logits are the 1,008 without bias.

    Measurements are called fid, kid, is only with the standard weights, by their sha256; with others fd_inception,
    and the protocol says that they are unknown. FIDs of implementations that resize or round in another way do not
    compare (Parmar et al. 2022, arXiv:2104.11222), so the protocol says how this one does: values are rounded to 256
    levels, grey becomes three equal channels, and images are resized to 299 x 299.

    Args:
        weights: a file of the weights, .pth (tensors only) or .safetensors; ``download`` to have torch.hub fetch the
            standard ones once; None for those that lie in torch.hub's folder already. Nothing else is downloaded.
        antialias: False resizes as TensorFlow 1 did, as in published FIDs; True as torchmetrics does by default,
            PyTorch's antialiased bilinear.

    Raises:
        ValueError: in one line, what to install or to put where.
    """

    dims = 2048
    batch = 64

    def __init__(self, weights: str | None = None, antialias: bool = False):
        self.antialias = antialias
        self.file = _standard_file(weights) if weights in (None, DOWNLOAD) else existing(weights)
        self.standard = sha256(self.file) == STANDARD
        self.name = "inception"
        self.names = {"fd": "fid", "kd": "kid", "is": "is", "fd_infinity": "fid_infinity"} if self.standard else {}
        self.net = _inception(self.file, sha256(self.file), antialias)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.net.to(device())
        rows, logits = self.net._torch_fidelity_forward(levels(images).to(device()))  # pyright: ignore[reportCallIssue]
        return rows, logits

    @property
    def protocol(self) -> dict[str, Any]:
        import torch_fidelity
        import torchmetrics

        resized = "PyTorch's bilinear, antialiased" if self.antialias else "bilinear as in TensorFlow 1"
        return {
            "extractor": "Inception v3, 2015-12-05" if self.standard else "Inception weights of unknown hash",
            "extractor_sha256": sha256(self.file),
            "preprocessing": f"rounded to 256 levels, {resized}, to 299x299",
            "network": f"torchmetrics {torchmetrics.__version__}, torch-fidelity {torch_fidelity.__version__}",
        }


class Torchvision(Features):
    """What goes into the last linear layer of a classifier of torchvision's, and its logits: fd_resnet50, kd_resnet50.

    Values are brought to [0, 1], grey becomes three equal channels, images are resized to ``side`` by PyTorch's
    antialiased bilinear, and ImageNet's mean and standard deviation are taken out.

    Args:
        model: its name in torchvision.models, such as resnet50, vgg16, vit_b_16 or convnext_tiny.
        weights: a file of its weights, .pth (tensors only) or .safetensors. Nothing is downloaded.
        side: pixels a side that it looks at.

    Raises:
        ValueError: there is no such model or file, they do not fit, or the model has no linear layer.
    """

    def __init__(self, model: str, weights: str, side: int = 224):
        from torchvision import models

        if model not in models.list_models(module=models):
            raise ValueError(f"features.model={model}: torchvision.models has no such classifier")
        if side < 1:
            raise ValueError(f"features.side={side}: need at least 1 pixel")
        self.name, self.side, self.file = model, side, existing(weights)
        self.net = models.get_model(model, weights=None)
        fit(self.net, self.file)
        self.net.eval().requires_grad_(False)
        linear = [layer for layer in self.net.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError(f"features.model={model}: has no linear layer, before which its features would be")
        self.dims = linear[-1].in_features
        linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._rows = given[0]

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.net.to(device())
        x = in_colour(images).to(device()) / 2 + 0.5
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
        logits = self.net((x - mean) / std)
        return self._rows.flatten(1), logits

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "extractor": f"torchvision {self.name}",
            "extractor_sha256": sha256(self.file),
            "preprocessing": f"bilinear, antialiased, to {self.side}x{self.side}; ImageNet's mean and deviation",
        }


def device() -> torch.device:
    """Where networks of others run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def in_colour(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) as (B, 3, H, W), values kept within [-1, 1]."""
    return images.clamp(-1, 1).expand(-1, 3, -1, -1)


def levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as they would be stored: the nearest of 256 levels, uint8, in colour."""
    return ((in_colour(images) + 1) * 127.5).round().byte()


def sha256(file: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    about = file.stat()
    return _sha256(file, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=8)
def _sha256(file: Path, changed: int, size: int) -> str:
    return checkpoint.sha256(file)


def read_weights(file: Path, option: str = "features.weights") -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or from a file of torch.save's that holds nothing else; never by
    unpickling.

    Raises:
        ValueError: it is neither.
    """
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError):
        raise ValueError(f"{option}={file}: need a file of tensors alone, by torch.save or safetensors") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{option}={file}: need tensors by name, a state_dict")
    return found


def fit(net: nn.Module, file: Path, option: str = "features.weights") -> None:
    """Load a file's weights into a network, strictly.

    Args:
        option: that named the file.

    Raises:
        ValueError: they do not fit.
    """
    try:
        net.load_state_dict(read_weights(file, option))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{option}={file}: these are not of {type(net).__name__}: {reason}") from None


def existing(path: str | None, option: str = "features.weights") -> Path:
    """A file that is there.

    Raises:
        ValueError: it is not.
    """
    file = Path(str(path)).expanduser()
    if not file.is_file():
        raise ValueError(f"{option}={path}: no such file")
    return file


def _standard_file(weights: str | None) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if file.is_file():
        return file
    if weights is None:
        raise ValueError(
            f"features.weights=null: there are no Inception weights at {file}; put {URL} there, or give "
            "weights=FILE, or weights=download"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL, str(file), hash_prefix=STANDARD, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"features.weights=download: {' '.join(str(error).split())}; put {URL} at {file}, or give weights=FILE"
        ) from None
    return file


@lru_cache(maxsize=2)
def _inception(file: Path, content: str, antialias: bool) -> nn.Module:
    """torchmetrics' network with a file's weights; one object for all callers.

    Args:
        content: the file's hash.
    """
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        raise ValueError(
            "features: Inception is run by torch-fidelity, which is not installed; pip install 'denoiselab[metrics]'"
        ) from None
    from torchmetrics.image.fid import NoTrainInceptionV3

    # The network unpickles the file that it is given, so it is given one that was written here, of tensors.
    safe = io.BytesIO()
    torch.save(read_weights(file), safe)
    safe.seek(0)
    try:
        net = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], safe, antialias)  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"features.weights={file}: these are not Inception's: {reason}") from None
    return net.requires_grad_(False)
