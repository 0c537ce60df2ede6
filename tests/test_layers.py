"""Who may import whom, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "denoiselab"

MATHEMATICS = {"torch"}
MEASURING = MATHEMATICS | {
    *("torchvision", "torchmetrics", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "safetensors"),
}
TRAINING = MEASURING | {"lightning", "rich", "wandb"}
CONFIGURING = TRAINING | {"hydra", "omegaconf", "yaml"}

LAYERS = {
    "arguments confidential errors files version trust rows status buffers progress _torchvision __init__ __main__": {
        "torch"
    },
    "schedule target consistency gaussian weighting timesteps denoiser guidance loss models": MATHEMATICS,
    "sampler likelihood": MATHEMATICS | {"torchdiffeq"},
    "exchange": MATHEMATICS | {"safetensors"},
    "rng conditioning curve lr_schedule ema archive checkpoint summary speed": MATHEMATICS,
    "data": MEASURING | {"datasets", "webdataset", "diffusers"},
    "metrics": MEASURING | {"torch_fidelity", "transformers"},
    "pictures diagnostics scripted lint": MEASURING,
    "preference": MEASURING | {"jinja2", "markupsafe"},
    "report": {"jinja2", "markupsafe", "pandas", "numpy", "scipy", "matplotlib", "PIL", "yaml", "optuna"},
    "module sharding callbacks loggers ranks resuming trainer training announcing initial": TRAINING,
    "evaluation inspection content drawing encoding fitting measuring outline run run_folder": TRAINING,
    "compose values experiment checks study cli": CONFIGURING,
    "launcher": {"torch", "submitit", "ray"},
    "sweeper": {"optuna"},
    "dashboard": {"yaml", "wandb", "wandb_workspaces"},
    "bench": TRAINING | {"diffusers"},
}
STANDARD = __import__("sys").stdlib_module_names

FORBIDDEN = {
    "schedule target weighting timesteps denoiser guidance loss rng sampler likelihood models": (
        *("data", "metrics", "callbacks", "module", "training", "evaluation", "experiment", "compose", "run", "cli"),
    ),
    "data metrics ema": ("callbacks", "module", "training", "evaluation", "experiment", "compose", "run", "cli"),
    "exchange": ("data", "callbacks", "module", "training", "evaluation", "experiment", "compose", "run", "cli"),
    "module callbacks loggers": ("training", "evaluation", "experiment", "compose", "run", "cli"),
    "report": ("module", "training", "evaluation", "experiment", "compose", "run", "cli", "checkpoint", "schedule"),
}
"""Our own modules that a layer may not import."""


def files(names: str) -> list[Path]:
    found = []
    for name in names.split():
        found += sorted((SOURCE / name).rglob("*.py")) if (SOURCE / name).is_dir() else [SOURCE / f"{name}.py"]
    return found


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_a_layer():
    assert {p for names in LAYERS for p in files(names)} == set(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("names", LAYERS)
def test_third_party_imports_stay_in_their_layer(names: str):
    for path in files(names):
        packages = {name.partition(".")[0] for name in imports(path)} - STANDARD - {"denoiselab"}
        assert packages <= LAYERS[names], f"{path.name} imports {packages - LAYERS[names]}"


@pytest.mark.parametrize("names", FORBIDDEN)
def test_no_layer_imports_one_above_it(names: str):
    for path in files(names):
        above = {name for name in imports(path) for upper in FORBIDDEN[names] if name.startswith(f"denoiselab.{upper}")}
        above = {name for name in above if name.split(".")[1] in FORBIDDEN[names]}
        assert not above, f"{path.name} imports {above}"


UNSAFE = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "torch.hub", "os.system", "load_from_checkpoint"}


def test_nothing_in_the_source_can_run_a_file():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in UNSAFE, f"{path}: {called}"
                assert called != "torch.jit.load" or path.name == "scripted.py", f"{path}: {called}"
                assert keywords.get("shell") != "True", f"{path}: shell=True"
                assert keywords.get("allow_pickle") != "True", f"{path}: allow_pickle=True"
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", f"{path}: torch.load"
