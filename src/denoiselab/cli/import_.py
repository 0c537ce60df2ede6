"""denoiselab import"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from denoiselab.cli import parse
from denoiselab.compose import Composed, compose, conf_dir, options, plain, read_yaml, to_yaml
from denoiselab.errors import CheckpointError, UserError

ABOUT = """Make a run directory of a network that was trained elsewhere: a pipeline or a model of diffusers, a
checkpoint of guided-diffusion or of DiT, or an export of denoiselab. Every option of `denoiselab train` can be given
beside source; data=... names what the network is compared with."""

OWN = ("source", "format", "step", "new_attention_order")
"""Options of this command that are none of a run's."""

FIXED = ("embedding", "sigma_data")
"""Options that the weights decide."""

SAME = 1e-6
"""Nats between log-SNRs that are one, as in a schedule's fingerprint."""

EXAMPLE = {"schedule": "linear", "target": "eps"}


@dataclass
class Imported:
    """A network from elsewhere, and what its source says of the run that it becomes."""

    file: Path
    """With its weights."""
    interface: dict[str, Any]
    """Without a codec, where the data say it."""
    ema: dict[str, Any]
    raw: dict[str, Any]
    """Weights, by the names of the denoiser."""
    lines: list[str] = field(default_factory=list)
    """What is said as options; those of the command come after them."""
    nodes: dict[str, Any] = field(default_factory=dict)
    """What is said in place of options."""
    learned: dict[str, Any] = field(default_factory=dict)
    """What the schedule and the loss have learned, by the names of a checkpoint."""
    step: int = 0
    fingerprint: str | None = None
    """Of its schedule, where the source says it."""
    notes: list[str] = field(default_factory=list)


def main(words: list[str]) -> int:
    overrides, config_dir, multirun = parse(words, "import", ABOUT)
    if multirun:
        raise UserError("-m: import makes one run")
    asked = compose("import", overrides, config_dir)  # a mistyped option need not wait for torch
    config = plain(asked)
    chosen = {line.lstrip("+~").partition("=")[0].partition(".")[0]: line for line in overrides}

    from denoiselab.exchange import sources

    path, kind = Path(config["source"]), config["format"]
    if kind not in (None, *sources.FORMATS):
        raise UserError(f"format={kind}: need one of {', '.join(sources.FORMATS)}, or null to find out")
    kind, content = sources.look(path, kind)
    for group in (*FIXED, *(["model"] if kind in ("safetensors", "diffusers") else [])):
        if group in chosen:
            raise UserError(f"{chosen[group]}: the source says what its network is; leave it out")
    if kind == "safetensors":
        found = from_export(path, chosen)
    elif kind == "diffusers":
        found = from_elsewhere(sources.diffusers(path), chosen)
    elif kind == "dit":
        heads = config["model"].get("heads") if "model" in chosen else None
        found = from_elsewhere(sources.published_dit(path, content, heads), chosen)
    else:
        arguments, order = architecture(path, config, chosen), config["new_attention_order"]
        found = from_elsewhere(sources.guided_diffusion(path, content, arguments, order), chosen)
    found.step = config["step"] if "step" in chosen else found.step
    folder = write(found, *compose_run(found, overrides, chosen, config_dir))
    for line in found.notes:
        print(f"note: {line}", file=sys.stderr)
    print(folder, flush=True)  # alone on stdout, for scripts: run=$(denoiselab import ...)
    return 0


def from_export(folder: Path, chosen: dict[str, str]) -> Imported:
    """What `denoiselab export format=safetensors` wrote."""
    from denoiselab import trust
    from denoiselab.exchange import ours

    content = ours.read(folder, {"ema": "", "raw": ""})
    facts, state = content["denoiselab"], content["state_dict"]
    trust.check_record(facts, facts["config"], str(folder))
    trust.check(facts["config"], str(folder))
    trust.check(facts["interface"], str(folder))
    learned = {key: state.pop(key) for key in list(state) if not key.startswith("net.")}
    other = {group for group in ("schedule", "loss") if group in chosen}
    learned = {key: value for key, value in learned.items() if key.partition(".")[0] not in other}
    brought = ("weighting", "timesteps") if "loss" in chosen else ()  # by the recipe that was chosen
    nodes = {group: facts["config"][group] for group in ours.GROUPS if group not in brought}
    fingerprint = None if "schedule" in chosen else facts["fingerprint"]
    file, step = folder / "model.safetensors", content["global_step"]
    return Imported(file, facts["interface"], state, state, [], nodes, learned, step, fingerprint)


def from_elsewhere(source: Any, chosen: dict[str, str]) -> Imported:
    """Another library's network."""
    for group, said in (("schedule", source.schedule), ("target", source.target)):
        if said is None and group not in chosen:
            raise UserError(f"{source.file}: says nothing of its {group}; name it, as in {group}={EXAMPLE[group]}")
    arguments = dict(source.arguments)
    facts = {"vector": 0, "low_res": arguments.pop("low_res", 0)}
    interface = {**facts, **{key: arguments.pop(key) for key in ("shape", "num_classes")}}
    outputs = arguments.pop("outputs")
    del arguments["embedding"]
    if outputs > 2:
        raise CheckpointError(f"{source.file}: returns {outputs} tensors like x; need 1, or 2 with a variance")
    lines = [f"loss={'simple' if outputs == 1 else 'learned_hybrid'}", f"embedding={source.embedding}", "sigma_data=1"]
    lines += [f"{group}={said}" for group, said in (("target", source.target), ("spacing", source.spacing)) if said]
    lines += [] if source.has_null else ["p_null=0"]
    nodes = {"model": {"_target_": source.model, "_partial_": True, **arguments}}
    nodes |= {"schedule": by_name(source.schedule)} if source.schedule else {}
    ema, raw = ({f"net.{key}": value for key, value in state.items()} for state in (source.state, source.raw))
    return Imported(source.file, interface, ema, raw, lines, nodes, notes=source.notes)


def architecture(path: Path, config: dict[str, Any], chosen: dict[str, str]) -> dict[str, Any]:
    """The network's arguments and the shape of its images, as the command says them."""
    from denoiselab.experiment import Parts

    for group, example in (("model", "model=unet_adm64"), ("data", "data.shape=[3,64,64]")):
        if group not in chosen:
            raise UserError(f"{path}: holds weights alone, and says nothing of its {group}; name it, as in {example}")
    arguments = {key: value for key, value in config["model"].items() if not key.startswith("_")}
    return {**arguments, "shape": list(Parts(config).data.shape)}


def by_name(node: dict[str, Any]) -> dict[str, Any]:
    """An option of the schedule group with the same log-SNRs at the same points, or the node as it is."""
    import torch

    from denoiselab.exchange.schedules import made
    from denoiselab.experiment import Parts

    table = made(node)
    assert table.points is not None
    t = torch.linspace(0, 1, table.points, dtype=torch.float64)
    for name in options()["schedule"]:
        file = conf_dir() / "schedule" / f"{name}.yaml"
        option = read_yaml(file.read_text(), str(file))
        schedule = Parts({"schedule": option}).schedule
        if schedule.points == table.points and bool((schedule.log_snr(t) - table.log_snr(t)).abs().max() < SAME):
            return option
    return node


def compose_run(
    found: Imported, overrides: list[str], chosen: dict[str, str], config_dir: Path | None
) -> tuple[Composed, dict[str, Any]]:
    """The run's configuration and interface: what the source says, unless the command says otherwise."""
    from denoiselab.experiment import Parts

    composed = compose("import", [*found.lines, *overrides], config_dir)
    config = composed.config
    for group, node in found.nodes.items():
        if group in chosen and group != "model":
            found.notes.append(f"{chosen[group]}: in place of what the source says")
            continue
        config[group] = node
        if group in composed.choices:
            composed.choices[group] = str(node["_target_"]).rpartition(".")[2]
    for option in OWN:
        del config[option]
    interface = dict(found.interface)
    if composed.choices["data"] == "unknown" and "codec" not in interface:
        config.data.shape, config.data.num_classes = list(interface["shape"]), interface["num_classes"]
    if "codec" not in interface or "data" in chosen:
        data = Parts(plain(composed)).data
        interface["codec"] = data.codec.config()
        theirs = {"shape": tuple(interface["shape"]), "low_res": interface["low_res"]}
        for fact, value in theirs.items():
            if value != getattr(data, fact):
                what = f"{fact} {value} and data={composed.choices['data']} {getattr(data, fact)}"
                raise UserError(f"{found.file}: the network has {what}; name the data that it was trained on")
        if interface["num_classes"] not in (0, data.num_classes):
            classes = interface["num_classes"], data.num_classes
            raise UserError(
                f"{found.file}: the network knows {classes[0]} classes and the data {classes[1]}; need as many"
            )
    return composed, interface


def write(found: Imported, composed: Composed, interface: dict[str, Any]) -> Path:
    """The run directory, made after everything was tried that reading it will do."""
    import torch

    from denoiselab import checkpoint
    from denoiselab.checks import check_pure_noise
    from denoiselab.experiment import Parts, identity
    from denoiselab.run import PREFIX, Run
    from denoiselab.run_folder import RunFolder, slug
    from denoiselab.version import CHECKPOINT_VERSION

    config = plain(composed)
    parts = Parts(config, interface=interface)
    check_pure_noise(parts)
    sha256 = checkpoint.sha256(found.file)
    facts = identity(config, f"import:{sha256}")
    folder = RunFolder(Path(config["output_dir"]) / config["name"] / slug(facts), facts)
    state = {"ema.updates": torch.zeros((), dtype=torch.int64), **found.learned}
    for weights, values in (("raw", found.raw), ("ema", found.ema)):
        state |= {PREFIX[weights] + key: value for key, value in values.items()}
    record = {
        "version": CHECKPOINT_VERSION,
        "config": to_yaml(composed),
        "identity": facts,
        "interface": interface,
        "choices": composed.choices,
        "fingerprint": found.fingerprint or parts.schedule.fingerprint,
    }
    content = {"state_dict": state, "global_step": found.step, "denoiselab": record}
    for weights in PREFIX:
        Run.of(parts, content, weights, found.file, folder.path)

    made = {"choices": composed.choices, "overrides": composed.overrides, "weight": parts.weighting.formula}
    made["parameters"] = sum(p.numel() for p in parts.denoiser.parameters())
    made["imported"] = {"file": str(found.file.resolve()), "sha256": sha256}
    with folder.locked():
        if config["rerun"]:
            folder.move_aside()
        folder.describe(record["config"], made)
        checkpoint.save(content, folder.path / "checkpoints" / "last.ckpt")
        folder.status("done", found.step, found.step)
    return folder.path
