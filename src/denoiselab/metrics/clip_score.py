"""Do samples show what a text says?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab.data.base import Data
from denoiselab.metrics.base import Measurement, Metric
from denoiselab.metrics.networks import device, in_colour, sha256

BATCH = 32

Similarity = Callable[[Tensor, Sequence[str]], Tensor]
"""Images (B, 3, H, W) in [0, 1] and B texts to the cosines of their embeddings, (B,); with a ``protocol``."""


class ClipScore(Metric):
    """clip_score = mean over samples of 100 max(cos(E_image(sample i), E_text(line i)), 0) (Hessel et al. 2021,
    arXiv:2104.08718, whose factor is 2.5 in place of 100).

    The texts are given, since no data set here has captions: a line per sample in order, the lines taken in turn where
    there are fewer. Classes are asked for in turn too, so a line per class in the order of the classes is a text for
    every sample.

    Control ``other_texts``: the same with each sample's text moved on by one line.

    Args:
        prompts: a text file, UTF-8, a line each; at least two different ones.
        clip: what says how well image and text go together: ``Clip``, or your own class.
    """

    def __init__(self, prompts: str, clip: Similarity):
        file = Path(prompts).expanduser()
        if not file.is_file():
            raise ValueError(f"prompts={prompts}: no such file; need a text per line, in the order of the samples")
        self.prompts, self.clip = [line for line in file.read_text("utf-8").splitlines() if line.strip()], clip
        if len(set(self.prompts)) < 2:
            raise ValueError(f"prompts={prompts}: need at least two different lines")
        self.sha256 = sha256(file)

    def check(self, data: Data) -> None:
        if len(data.shape) != 3 or data.shape[0] not in (1, 3):
            raise ValueError(f"metrics: clip_score looks at images of 1 or 3 channels; data of shape {data.shape}")

    def measure(self, generated: Tensor, label: Tensor | None, data: Data) -> list[Measurement]:
        own, other = (self.of(generated, step) for step in (0, 1))
        return [
            Measurement(
                "clip_score",
                own,
                better="higher",
                controls={"other_texts": other},
                protocol={
                    **getattr(self.clip, "protocol", {"extractor": type(self.clip).__name__}),
                    "formula": "mean of 100 max(cos, 0)",
                    "prompts_sha256": self.sha256,
                    "prompts": len(self.prompts),
                },
            )
        ]

    @torch.no_grad()
    def of(self, images: Tensor, step: int) -> float:
        """The score of samples i with lines i + step, in turn."""
        found = []
        for index in torch.arange(len(images)).split(BATCH):
            texts = [self.prompts[(i + step) % len(self.prompts)] for i in index.tolist()]
            found.append(self.clip(in_colour(images[index]) / 2 + 0.5, texts).double().cpu())
        return 100 * torch.cat(found).clamp_min(0).mean().item()


class Clip:
    """cos of a CLIP model's embeddings of images and texts (Radford et al. 2021, arXiv:2103.00020), by transformers,
    which is not among the packages that denoiselab installs.

    Args:
        folder: of a model as Hugging Face keeps it: config.json, model.safetensors, tokenizer and preprocessor files.
            Nothing is downloaded, and no code of the folder is run.

    Raises:
        ValueError: transformers is not installed, or the folder does not hold a model.
    """

    def __init__(self, folder: str):
        path = Path(folder).expanduser()
        missing = [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]
        if missing:
            raise ValueError(f"clip.folder={folder}: has no {missing[0]}; need a CLIP model as Hugging Face keeps it")
        try:
            from transformers import CLIPModel, CLIPProcessor  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("clip: is run by transformers, which is not installed; pip install transformers") from None
        try:
            self.model = CLIPModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True).eval()
            self.processor = CLIPProcessor.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"clip.folder={folder}: {' '.join(str(error).split())[:200]}") from None
        self.file = path / "model.safetensors"

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosines, (B,)."""
        self.model.to(device())
        given = self.processor(
            text=list(texts), images=[*images], do_rescale=False, return_tensors="pt", padding=True, truncation=True
        ).to(device())
        found = self.model(**given)
        pair = (torch.nn.functional.normalize(rows, dim=-1) for rows in (found.image_embeds, found.text_embeds))
        one, other = pair
        return (one * other).sum(-1)

    @property
    def protocol(self) -> dict[str, Any]:
        """The weights and what runs them."""
        import transformers  # pyright: ignore[reportMissingImports]

        return {
            "extractor": "CLIP",
            "extractor_sha256": sha256(self.file),
            "preprocessing": "the folder's own, of values in [0, 1]",
            "implementation": f"transformers {transformers.__version__}",
        }
