"""Training that starts from another run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from denoiselab import checkpoint
from denoiselab.errors import UserError
from denoiselab.module import Diffusion
from denoiselab.run import PREFIX, find_checkpoint
from denoiselab.schedule import Schedule


def initial(config: dict[str, Any], schedule: Schedule) -> Path:
    """The checkpoint to start from; refused if its schedule or target is another, unless that is allowed."""
    file = find_checkpoint(config["init_from"])
    content = checkpoint.load(file)["denoiselab"]
    if config["init_mismatch"] != "allow":
        differing = {
            "schedule": (content["fingerprint"], schedule.fingerprint),
            "target": (_class(content["identity"].get("target")), config["target"]["_target_"]),
        }
        for what, (theirs, ours) in differing.items():
            if theirs != ours:
                raise UserError(
                    f"init_from={file}: trained with {what} {theirs}, this run has {ours}; init_mismatch=allow says "
                    "that is meant"
                )
    return file


def _class(node: Any) -> Any:
    """The class that a node names, if it is one."""
    return node.get("_target_") if isinstance(node, dict) else None


def start_from(module: Diffusion, file: Path, config: dict[str, Any]) -> list[str]:
    """Load what fits of another run's weights into the denoiser and its EMA; lines that say what did not.

    Raises:
        UserError: nothing fits, or something does not and ``init_mismatch`` is not ``allow``.
    """
    content = checkpoint.load(file)
    prefix = PREFIX[config["init_weights"]]
    theirs = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    own = module.denoiser.state_dict()
    fitting = {k: v for k, v in theirs.items() if k in own and own[k].shape == v.shape}
    misfits = sorted((own.keys() | theirs.keys()) - fitting.keys())
    if not fitting:
        raise UserError(f"init_from={file}: none of its weights fit this model")
    if misfits and config["init_mismatch"] != "allow":
        raise UserError(
            f"init_from={file}: {len(misfits)} weights do not match ({', '.join(misfits[:5])}, ...); "
            "init_mismatch=allow starts from the rest"
        )
    for model in (module.denoiser, module.ema.model):
        model.load_state_dict({**own, **fitting})
    lines = [f"starting from the {config['init_weights']} weights of {file} (step {content['global_step']})"]
    return lines + ([f"not matched, left at their initial values: {', '.join(misfits)}"] if misfits else [])
