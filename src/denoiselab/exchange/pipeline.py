"""A denoiser as a folder that diffusers reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from denoiselab.denoiser import Denoiser, LearnedVariance
from denoiselab.errors import CheckpointError, UserError
from denoiselab.exchange import dit, unet
from denoiselab.exchange.files import Content
from denoiselab.exchange.schedules import levels, to_scheduler
from denoiselab.models import DiT, UNet
from denoiselab.schedule import Schedule
from denoiselab.target import EDM, X0, Eps, V

PREDICTIONS = {Eps: "epsilon", X0: "sample", V: "v_prediction", EDM: "v_prediction"}
"""What diffusers calls our targets; EDM's with sigma_data = 1 is -v."""

SPACINGS = ("trailing", "leading", "linspace")
"""The spacings that diffusers knows by these names."""

OTHERWISE = "format=safetensors keeps everything"

VERSION = {"_diffusers_version": "0.35.0"}


def diffusers(
    denoiser: Denoiser,
    schedule: Schedule,
    spacing: str = "trailing",
    label: int | None = None,
    latents: bool = False,
) -> Content:
    """The files of a pipeline that draws from a denoiser, by path.

    diffusers gives a network x_t itself, of alpha_t^2 + sigma_t^2 = 1, and an index of a table of T betas. That is
    c_in x_t where sigma_data = 1, whatever the scale of the schedule's own x_t; the table is ``schedules.levels``.

    Args:
        denoiser: of a UNet or a DiT.
        schedule: that it was trained along.
        spacing: one of SPACINGS.
        label: a class to fix, -1 for none: the network then takes no labels. None leaves them to the caller.
        latents: samples are to be decoded, which pipelines of a U-Net do not.

    Raises:
        UserError: diffusers has no way to call this denoiser.
    """
    net, target = denoiser.net, type(denoiser.target)
    if type(denoiser) not in (Denoiser, LearnedVariance):
        raise _refusal(f"nothing there is a {type(denoiser).__name__}")
    if target not in PREDICTIONS:
        raise _refusal(f"its schedulers know eps, x0, v and edm, and the target is {target.__name__}")
    scales = denoiser.sigma_data, getattr(denoiser.target, "sigma_data", 1.0)
    if scales != (1, 1):
        raise _refusal(
            f"its networks get x_t as it is, and this one has sigma_data={scales[0]:g}; train with sigma_data=1"
        )
    betas, c_noise = levels(schedule)
    part, config, state = _converted(net, c_noise)
    if target is EDM:
        _negate(config, state)
    if label is not None:
        _fix(config, state, label)
    learned = denoiser.has_variance and part == "unet"  # DiTPipeline leaves a variance out
    schedulers = to_scheduler(betas.tolist(), PREDICTIONS[target], spacing, learned)
    content = {
        f"{part}/config.json": {**config, **VERSION},
        f"{part}/diffusion_pytorch_model.safetensors": state,
        "scheduler/scheduler_config.json": {**schedulers, **VERSION},
    }
    parts = {part: ["diffusers", config["_class_name"]], "scheduler": ["diffusers", schedulers["_class_name"]]}
    if part == "transformer":
        index = {"_class_name": "DiTPipeline", **parts, "vae": ["diffusers", "AutoencoderKL"]}
    elif config["num_class_embeds"] or getattr(net, "low_res", 0) or latents:  # no pipeline gives it these, or decodes
        return content
    else:
        index = {"_class_name": "DDPMPipeline" if learned else "DDIMPipeline", **parts}
    return {**content, "model_index.json": {**index, **VERSION}}


def _refusal(why: str) -> UserError:
    return UserError(f"format=diffusers: {why}; {OTHERWISE}")


def _converted(net: nn.Module, c_noise: Tensor) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(folder, config, state) of a network."""
    try:
        if isinstance(net, UNet):
            return "unet", *unet.to_diffusers(net, c_noise)
        if isinstance(net, DiT):
            return "transformer", *dit.to_diffusers(net, c_noise)
    except CheckpointError as error:
        raise _refusal(str(error)) from None
    raise _refusal(f"model={type(net).__name__}, and need a UNet or a DiT")


def _negate(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Change the sign of y, which is all that a network gives but for a variance."""
    name = "conv_out" if "conv_out.weight" in state else "proj_out_2"
    for kind in ("weight", "bias"):
        rows = state[f"{name}.{kind}"].unflatten(0, (-1, config["out_channels"]))  # of a patch's pixels, of channels
        rows[:, : config["in_channels"]] *= -1


def _fix(config: dict[str, Any], state: dict[str, Tensor], label: int) -> None:
    """Make a U-Net of one class: that class's embedding is added to the noise level's, so a bias can hold it."""
    if config["_class_name"] != "UNet2DModel":
        raise UserError(f"label={label}: need null, {config['_class_name']} is always given its labels")
    classes = (config["num_class_embeds"] or 1) - 1
    if not -1 <= label < classes:
        need = f"a class in 0..{classes - 1}, or -1 for none" if classes else "null, this network takes no labels"
        raise UserError(f"label={label}: need {need}")
    state["time_embedding.linear_2.bias"] += state.pop("class_embedding.weight")[label]  # none is the last one
    config["num_class_embeds"] = None
