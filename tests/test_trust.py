"""What a configuration out of a file may name."""

from __future__ import annotations

import importlib
import sys

import pytest

from denoiselab import trust
from denoiselab.compose import compose, conf_dir, options, plain
from denoiselab.errors import UserError
from denoiselab.run import OF_TRAINING
from exact import needing

pytestmark = pytest.mark.faults

BYPASSES = [
    *("os.system", "builtins.eval", "subprocess.Popen", "posix.system", "torch.load", "torch.hub.load", "numpy.load"),
    *("torch.nn.Linear", "torch.nn.modules.module.torch.utils.collect_env.run", "torch.utils.collect_env.run"),
    *("denoiselab.checkpoint.torch.load", "denoiselab.cli.os.system", "denoiselab.run_folder.subprocess.run"),
    *("denoiselab.run_folder.os.remove", "denoiselab.schedule.torch", "denoiselab.files.Path", "denoiselab"),
    *(
        "denoiselab._torchvision.install",
        "denoiselab.schedule.Linear.__init__.__globals__",
        " denoiselab.schedule.Linear",
    ),
    *(
        "denoiselab.schedule.Linear\n",
        "denoiselab..schedule.Linear",
        "denoiselab.nowhere.Thing",
        "Denoiselab.schedule.Linear",
    ),
    *("torch.optim.AdamW ", "torch.optim.AdamW.__init__", "hydra.utils.instantiate", "hydra.utils.get_method"),
    *("denoiselab.cli.main", "denoiselab.files.write_text", "denoiselab.checkpoint.save", "denoiselab.training.Job"),
    *("denoiselab.run_folder.RunFolder", "denoiselab.data.autoencoders.read", "denoiselab.loggers.JsonLines"),
    *(["os.system"], None, 3, {"_target_": "os.system"}, ""),
]


@pytest.mark.parametrize("target", BYPASSES, ids=repr)
@pytest.mark.parametrize(
    "place",
    [lambda t: {"_target_": t}, lambda t: {"a": [{"b": {"_target_": t}}]}, lambda t: {"_args_": [{"_target_": t}]}],
    ids=["root", "list", "args"],
)
def test_everything_but_our_own_classes_is_refused(target, place):
    with pytest.raises(UserError, match="nothing was run"):
        trust.check(place(target), "file")


def test_no_module_is_imported_to_refuse_its_name(tmp_path, monkeypatch, faults):
    """Names of a module that leaves a mark when it is imported, which it does when somebody imports it."""
    marker = tmp_path / "marker"
    (tmp_path / "hostile_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ["hostile_module.Net", "hostile_module", "denoiselab.models.hostile_module.Net", "hostile_module.a.b"]
    for target in (*names, *BYPASSES):
        with pytest.raises(UserError, match="nothing was run"):
            trust.check({"model": {"_target_": target}}, "file")
    assert "hostile_module" not in sys.modules
    faults.refused(marker, len(names) + len(BYPASSES))
    importlib.import_module("hostile_module")
    assert marker.exists()
    del sys.modules["hostile_module"]


def test_every_shipped_configuration_passes(monkeypatch):
    """An option of every group at a time, until each was chosen; one that runs a program is allowed by name."""
    monkeypatch.setenv(trust.VARIABLE, "denoiselab.scripted.TorchScript")
    groups = options()
    for i in range(max(map(len, groups.values()))):
        chosen = {group: names[i % len(names)] for group, names in groups.items()}
        lines = [f"{group}={name}" for group, name in chosen.items()]
        lines += [line for name in chosen.values() for line in needing(name, "a")]
        lines += ["data.root=a"] if "root: ???" in (conf_dir() / "data" / f"{chosen['data']}.yaml").read_text() else []
        made = {group: node for group, node in plain(compose("train", lines)).items() if group not in OF_TRAINING}
        trust.check(made, " ".join(lines))


def test_a_name_is_allowed_exactly(monkeypatch):
    monkeypatch.setenv(trust.VARIABLE, "mylab.Net, mylab.Schedule")
    trust.check({"_target_": "mylab.Net"}, "file")
    with pytest.raises(UserError):
        trust.check({"_target_": "mylab.Net.other"}, "file")


def test_depth_is_bounded():
    node: dict = {}
    for _ in range(50):
        node = {"a": node}
    with pytest.raises(UserError, match="deeper"):
        trust.check(node, "file")
