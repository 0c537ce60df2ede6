"""A trained run: load it, sample it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoiselab import checkpoint, trust
from denoiselab.checks import check_evaluates, check_sampler
from denoiselab.compose import compose, plain, read_yaml
from denoiselab.conditioning import NULL
from denoiselab.data.base import Batch, Data
from denoiselab.denoiser import Denoiser
from denoiselab.drawing import drawn
from denoiselab.errors import CheckpointError, UserError
from denoiselab.exchange import ours
from denoiselab.experiment import Parts
from denoiselab.fitting import PREFIX, check_size, fit, load_weights, under
from denoiselab.loss import Loss
from denoiselab.progress import say

BATCH = 256
"""Samples per network call. Sample i has the same noise whatever the batch, and the same bits where batches are
the same, which no number of devices changes."""

OF_TRAINING = ("callbacks", "diagnostics", "logger", "launcher", "sweeper")
"""Groups that a run which is only loaded makes nothing of."""

DEVICES = ("auto", "cpu", "cuda")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or of a run directory the best one, where the run keeps that (early
    stopping), and otherwise the newest good one.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints"
        if (folder / "best.ckpt").is_file():
            return folder / "best.ckpt"
        newest = checkpoint.newest(folder, warn=lambda line: say(f"warning: {line}"))
        if newest is None:
            raise CheckpointError(f"{path}: no good checkpoint in {folder}")
        return newest[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such run directory or checkpoint file")
    return path


def device_of(option: str) -> torch.device:
    """Where one device is enough: the first of ``devices_of``."""
    return devices_of(option)[0]


def devices_of(option: str, chosen: Any = None) -> list[torch.device]:
    """Where to sample: ``auto`` is all GPUs that this process may use, or the CPU where there is none; ``cuda`` is all
    GPUs.

    Args:
        chosen: of the GPUs, as a Trainer's ``devices``: how many, a list of their numbers, or anything else for all.

    Raises:
        UserError: it is none of ``DEVICES``, or there is no GPU.
    """
    here = torch.cuda.is_available()
    if option not in DEVICES or (option == "cuda" and not here):
        raise UserError(f"device={option}: need one of {', '.join(DEVICES)}, and a GPU of CUDA's for cuda")
    if option == "cpu" or not here:
        return [torch.device("cpu")]
    numbers = chosen if isinstance(chosen, list) else range(torch.cuda.device_count())
    most = chosen if isinstance(chosen, int) and chosen > 0 else None
    return [torch.device("cuda", number) for number in numbers[:most]]


def load(path: str | Path, weights: str = "ema") -> Run:
    """A run from its directory or one of its checkpoint files.

    What the file says is not trusted: it holds tensors and primitives only, and may name our own classes and those
    that the user allowed.

    Args:
        path: a run directory, a .ckpt file, or a folder exported with format=safetensors.
        weights: ema or raw.

    Raises:
        CheckpointError: missing, damaged or foreign file.

    >>> import denoiselab
    >>> run = denoiselab.load(example_run)
    >>> images = run.sample(n=16, label=3, sampler="ddim", steps=20, scale=2.0)
    >>> images.shape
    torch.Size([16, 1, 8, 8])
    """
    if weights not in PREFIX:
        raise UserError(f"weights={weights}: need ema or raw")
    file = Path(path) if ours.is_export(Path(path)) else find_checkpoint(path)
    exported = file.is_dir()
    content = ours.read(file, PREFIX) if exported else checkpoint.load(file)
    try:
        parts = parts_of(content, file, content["denoiselab"]["config"] if exported else None)
        check_size(parts, content["state_dict"], file)
        return Run.of(parts, content, weights, file, file if exported else folder_of(file))
    except UserError as error:
        if str(file) in str(error):
            raise
        raise CheckpointError(f"{file}: {error}") from None  # of a part, which knows its option alone


def parts_of(content: dict[str, Any], file: Path, config: dict[str, Any] | None = None) -> Parts:
    """What a checkpoint says a run was made of; it is not trusted.

    Args:
        content: of the file.
        config: None for the one in the content.
    """
    if config is None:
        config = read_yaml(content["denoiselab"]["config"], f"{file} (config)")
    interface = content["denoiselab"]["interface"]
    config = {group: node for group, node in config.items() if group not in OF_TRAINING}
    trust.check_record(content["denoiselab"], config, str(file))
    trust.check(config, str(file))
    trust.check(interface, str(file))
    return Parts(config, interface=interface)


def frozen(ckpt: str, weights: str = "ema") -> Denoiser:
    """The denoiser of another run, in evaluation mode and without gradients: a teacher, or a weaker model.

    Args:
        ckpt: a run directory or a .ckpt file.
        weights: ema or raw.
    """
    try:
        return load(ckpt, weights).denoiser.requires_grad_(False)
    except CheckpointError as error:
        raise CheckpointError(f"ckpt={error}") from None


def folder_of(file: Path) -> Path:
    """The run directory of a checkpoint, or a folder of its own name beside a file that lies elsewhere."""
    run = file.parent.parent
    return run if (run / "identity.json").is_file() else file.with_suffix("")


class Run:
    """A denoiser with its schedule and codec, ready to be sampled.

    Args:
        parts: of its configuration.
        denoiser: with the weights to use.
        step: optimizer steps it was trained for.
        weights: which weights these are, ema or raw.
        folder: the run directory.
        record: what its checkpoint says of it.
        learned: what its loss has learned, by the names of the loss's own state.
    """

    def __init__(
        self,
        parts: Parts,
        denoiser: Denoiser,
        step: int,
        weights: str,
        folder: Path,
        record: dict[str, Any],
        learned: dict[str, Tensor],
    ):
        self.parts, self.step, self.weights, self.folder, self.record = parts, step, weights, folder, record
        self.denoiser = denoiser.eval()
        self.schedule = parts.schedule.to(self.device)
        self.codec = parts.codec.to(self.device)
        self.learned = learned
        self.others: list[torch.device] = []
        """Devices beside its own that samples are drawn on."""

    @classmethod
    def of(cls, parts: Parts, content: dict[str, Any], weights: str, file: Path, folder: Path) -> Run:
        """A run from its parts and the content of its checkpoint.

        Raises:
            CheckpointError: the weights do not fit, or the schedule is not the one that was trained along.
        """
        state, record = content["state_dict"], content["denoiselab"]
        load_weights(parts.denoiser, state, weights, file)
        fit(parts.schedule, "schedule.", state, file)
        if parts.schedule.fingerprint != record["fingerprint"]:
            raise CheckpointError(
                f"{file}: was trained along {record['fingerprint']}, its configuration gives "
                f"{parts.schedule.fingerprint}"
            )
        return cls(parts, parts.denoiser, content["global_step"], weights, folder, record, under("loss.", state))

    @cached_property
    def loss(self) -> Loss:
        """The training loss, as trained."""
        self.parts.loss.load_state_dict(self.learned)
        return self.parts.loss.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str, *others: torch.device) -> Run:
        """Move the networks.

        Args:
            others: devices that ``draw`` shares its batches with.
        """
        self.others = [*others]
        for part in (self.denoiser, self.schedule, self.codec):
            part.to(device)
        return self

    def sample(
        self,
        n: int = 16,
        label: int | Sequence[int] | None = None,
        sampler: str = "ddim",
        steps: int | None = None,
        scale: float = 1.0,
        seed: int = 0,
        schedule: str | None = None,
        given: Mapping[str, Tensor] | None = None,
        options: Sequence[str] = (),
    ) -> Tensor:
        """n samples: float32 (n, C, H, W) in [-1, 1] for images, (n, D) in their own units for points.

        Args:
            label: one class for all, or one each; None as ``cond`` says.
            sampler: an option of the sampler group.
            steps: noise levels; None for the option's own number.
            scale: guidance; 1 is off.
            seed: of the noise. Sample i of a seed does not depend on n.
            schedule: an option of the schedule group to sample along; None for the one that was trained along.
            given: what else the samples are made of, as ``cond`` takes it: ``{"low_res": images}`` enlarges images.
            options: others of ``denoiselab sample``, such as ``["guidance=replacement", "guidance.low=0"]``.
        """
        overrides = [f"sampler={sampler}", "ckpt=none", *options]
        overrides += [f"guidance.scale={scale}"] if scale != 1 else []
        overrides += [f"sampler.steps={steps}"] if steps is not None else []
        overrides += [f"schedule={schedule}"] if schedule is not None else []
        parts = self.parts_for(plain(compose("sample", overrides)))
        return self.draw(parts, self.cond(n, label, given), range(n), seed)[0]

    def parts_for(self, config: dict[str, Any]) -> Parts:
        """The parts that a configuration for sampling names, and the run's own schedule unless it names another.

        Raises:
            UserError: its sampler cannot use this run's denoiser or the schedule.
        """
        trained = {group: self.parts.config[group] for group in ("data", "schedule", "loss", "p_null", "sigma_data")}
        parts = Parts({**trained, **config}, interface=self.parts.interface)
        if "schedule" not in config:
            parts.schedule = self.schedule
        parts.schedule.to(self.device)
        if self.denoiser.generates:
            check_sampler(parts, self.denoiser)
        return parts

    @property
    def made_of(self) -> list[str]:
        """What its samples are made of beside noise and a class: ``low_res``, ``vector``, or nothing."""
        return [name for name in ("low_res", "vector") if getattr(self.parts, name)]

    def cond(
        self, n: int, label: int | Sequence[int] | None = None, given: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What n samples are asked for, a row each; nothing where the model is unconditional.

        Args:
            label: one class for all, or one each. None: every class in turn; where samples are made of held-out
                conditions, those samples' own; where they are made of given ones, no class.
            given: conditions whose rows are taken in turn: low_res (k, C, h, w) in [-1, 1], vector (k, V), or what a
                guidance asks for. What the model needs and is not given is that of the first n held-out samples.
        """
        found = {name: rows[torch.arange(n) % len(rows)] for name, rows in self._checked(given or {}).items()}
        missing = [name for name in self.made_of if name not in found]
        own = self.held_out(n)["cond"] if missing else {}
        if missing and len(own[missing[0]]) < n:
            raise UserError(f"n={n}: samples are made of held-out ones, and there are {len(own[missing[0]])}")
        found |= {name: own[name] for name in missing}
        if label is None and self.parts.num_classes and self.made_of:
            return {"label": own["label"] if missing else self._no_class(n), **found}
        return {**self.labels(n, label), **found}

    def labels(self, n: int, label: int | Sequence[int] | None = None) -> dict[str, Tensor]:
        """The classes of n samples, or nothing where the model knows none.

        Args:
            label: one class for all, one each, or None for every class in turn.
        """
        classes = self.parts.num_classes
        if not classes:
            if label is not None:
                raise UserError(f"label={label}: this model was trained without labels")
            return {}
        if label is None:
            return {"label": torch.arange(n) % classes}
        labels = torch.tensor([label] * n if isinstance(label, int) else list(label))
        if len(labels) != n or not bool(((labels >= 0) & (labels < classes)).all()):
            raise UserError(f"label={label}: need one class, or one for each of the {n} samples, in 0..{classes - 1}")
        return {"label": labels}

    def _no_class(self, n: int) -> Tensor:
        if self.parts.config["p_null"] == 0:
            raise UserError("label=null: this model was trained with p_null=0, never without a class; name one")
        return torch.full((n,), NULL)

    def held_out(self, n: int, data: Data | None = None) -> Batch:
        """The first n held-out samples, or all where there are fewer, in the order of ``Samples.draw``; their ``cond``
        is what this model knows.

        Args:
            data: the data set; None for the one that was trained on, which must be there.
        """
        try:
            batch = (data or self.parts.data).held_out.draw(n)
        except UserError as error:
            names = ", ".join(self.made_of)
            raise UserError(f"{names}: not given, and the held-out ones cannot be had: {error}") from None
        known = [*self.made_of, *(["label"] if self.parts.num_classes else [])]
        return {**batch, "cond": {name: value for name, value in batch["cond"].items() if name in known}}

    def _checked(self, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for name in ("low_res", "vector"):
            if name in given and name not in self.made_of:
                raise UserError(f"{name}: this model was trained without it")
        if "low_res" in given:
            self.check_low_res(given["low_res"])
        need = self.parts.vector
        if "vector" in given and given["vector"].shape[1:] != (need,):
            raise UserError(f"vector: has shape {tuple(given['vector'].shape)}; need {need} numbers in each row")
        return given

    def check_low_res(self, low_res: Tensor, name: str = "low_res") -> None:
        """Images (k, C, h, w) must be of the size that this model was trained to enlarge, with values in [-1, 1].

        Raises:
            UserError: they are not, or the model enlarges nothing.
        """
        if "low_res" not in self.made_of:
            raise UserError(f"{name}: this model enlarges no images; that wants a run with data=super_resolution")
        channels, (height, width) = self.parts.low_res, self.parts.shape[1:]
        factor = self.parts.config["data"].get("factor")
        if factor is None:  # of a network that came without its data: any whole one
            factor = max(1, height // low_res.shape[-2])
        need = (channels, height // factor, width // factor)
        if tuple(low_res.shape[1:]) != need:
            have, wanted = (" x ".join(map(str, sides)) for sides in (low_res.shape[1:], need))
            raise UserError(f"{name}: is {have}; need {wanted}, which become {height} x {width} pixels")
        low, high = low_res.min().item(), low_res.max().item()  # NaN if any value is
        if not (low >= -1 and high <= 1):
            raise UserError(f"{name}: has values from {low:.4g} to {high:.4g}; need numbers in [-1, 1]")

    def elsewhere(self, parts: Parts) -> list[str]:
        """The schedule to sample along, if it is not the one that was trained along."""
        along = parts.schedule.fingerprint
        return [] if along == self.schedule.fingerprint else [along]

    def draw(
        self,
        parts: Parts,
        cond: dict[str, Tensor],
        ids: Sequence[int],
        seed: int = 0,
        progress: Callable[[int], object] = lambda done: None,
    ) -> tuple[Tensor, float]:
        """Decoded samples with these ids on the CPU, made in batches, and the network calls of a sample's walk.

        Args:
            parts: whose sampler, guidance and schedule to use, from parts_for.
            cond: what the samples are asked for, a row each.
            progress: is told how many samples each batch added.
        """
        check_sampler(parts, self.denoiser)
        check_evaluates(self.denoiser)
        return drawn(self, parts, cond, ids, seed, BATCH, progress)
