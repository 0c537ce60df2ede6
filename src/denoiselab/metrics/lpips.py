"""How different do two images look to a network?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.networks import device, existing, fit, in_colour, sha256

NETS = {"alex": "alexnet", "vgg": "vgg16"}
"""torchvision's names."""

BATCH = 32


class LPIPS(Metric):
    """lpips_NET: sum over layers l of the mean over places of sum_c w_lc (phi_lc(a) - phi_lc(b))^2, phi normalised over
    channels, of sample i against the held-out image i of which it was made; the mean over images (Zhang et al. 2018,
    arXiv:1801.03924, eq. 1).

    The network is AlexNet or VGG-16 of ImageNet, from a file of torchvision's weights; w is the authors' version 0.1,
    which torchmetrics has. 0 for equal images. Grey becomes three equal channels; nothing is resized, so images must be
    large enough for the network, 32 pixels a side or more.

    Control ``mean_image``: the same of the mean held-out image in place of each sample.

    Args:
        weights: a file of torchvision's ImageNet weights of the network, .pth (tensors only) or .safetensors.
        net: alex or vgg; their values do not compare.

    Raises:
        ValueError: there is no such file, or it holds other weights.
    """

    paired = True

    def __init__(self, weights: str, net: str = "alex"):
        if net not in NETS:
            raise ValueError(f"net={net}: need one of {', '.join(NETS)}")
        self.kind, self.file = net, existing(weights, "weights")
        self.net = network(net, weights)

    def check(self, data: Data) -> None:
        if len(data.shape) != 3 or data.shape[0] not in (1, 3) or min(data.shape[1:]) < 32:
            raise ValueError(f"metrics: lpips compares images of 32 x 32 pixels or more; data of shape {data.shape}")

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        import torchmetrics

        real = data.codec.decode(data.held_out.draw(len(generated))["x_0"])
        mean = real.mean(0, keepdim=True).expand_as(real)
        found, control = (self.of(images, real).mean().item() for images in (generated, mean))
        return [
            Measurement(
                f"lpips_{self.kind}",
                found,
                better="lower",
                controls={"mean_image": control},
                protocol={
                    "network": f"{NETS[self.kind]}, linear weights 0.1",
                    "network_sha256": sha256(self.file),
                    "implementation": f"torchmetrics {torchmetrics.__version__}, float32",
                    "pairs": "sample i and held-out image i",
                    "n_held_out": len(data.held_out),
                },
            )
        ]

    @torch.no_grad()
    def of(self, a: Tensor, b: Tensor) -> Tensor:
        """Of each pair of images (N, C, H, W) in [-1, 1], (N,), float64."""
        self.net.to(device())
        pairs = zip(a.split(BATCH), b.split(BATCH), strict=True)
        found = [self.net(in_colour(one).to(device()), in_colour(other).to(device())) for one, other in pairs]
        return torch.cat(found).flatten().double().cpu()


def network(kind: str, weights: str) -> nn.Module:
    """torchmetrics' network, its backbone with a file's weights."""
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision import models

    file = existing(weights, "weights")
    backbone = models.get_model(NETS[kind], weights=None)
    fit(backbone, file, option="weights")
    assert isinstance(backbone.features, nn.Sequential)
    net = _LPIPS(net=kind, pnet_rand=True)  # pyright: ignore[reportArgumentType]
    for part in net.net.children():
        for position, layer in part.named_children():  # named by their place in the backbone
            layer.load_state_dict(backbone.features[int(position)].state_dict())
    return net.eval().requires_grad_(False)
