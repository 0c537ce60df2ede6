"""Searches: what is drawn, what is remembered, and what an interruption changes (nothing)."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from denoiselab.cli import run
from denoiselab.cli.train import Training
from denoiselab.compose import read_job
from denoiselab.errors import Interrupted, RunHeld, UserError
from denoiselab.launcher import Launcher, Local, Task
from denoiselab.run_folder import digest
from denoiselab.sweeper import Optuna
from denoiselab.sweeper.base import Options
from test_sweep import TINY

# ---- runs that are a function of their options


class Made:
    """A run that is there, or not."""

    rerun = False

    def __init__(self, root: Path, overrides: list[str]):
        self.overrides = overrides
        self.options = dict(line.split("=", 1) for line in overrides)
        trained = {name: value for name, value in self.options.items() if name != "evaluation.seed"}
        self.path = root / "runs" / f"run-{digest(trained)}"
        self.evaluation_address = digest(["evaluation", self.options.get("evaluation.seed")])
        self.command = " ".join(["denoiselab train", *overrides])

    def _status(self) -> dict[str, Any]:
        file = self.path / "status.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    @property
    def finished(self) -> bool:
        return self.evaluation_address in self._status().get("evaluated", [])

    @property
    def error(self) -> str:
        return self._status().get("error", "")

    def set_aside(self) -> None:
        raise AssertionError("nothing was to be made again")

    def task(self, label: str) -> Task:
        return Task(label, self.overrides, self.path)

    def make(self, value: float | None, better: str, depends: str) -> int:
        """Write what a run writes."""
        self.path.mkdir(parents=True, exist_ok=True)
        if value is None:
            (self.path / "status.json").write_text(json.dumps({"state": "failed", "error": "OSError: disk full"}))
            return 1
        folder = self.path / "evaluations" / digest([self.evaluation_address, 4])
        folder.mkdir(parents=True)
        record = {"name": "mmd2", "value": value, "better": better, "controls": {}, "protocol": {"k": depends}}
        protocol = {"step": 4, "n": 9, "weights": "ema", "sampler": {}, "guidance": {"scale": 1}}
        content = {"protocol": protocol, "records": [{**record, "details": {}}]}
        (folder / "evaluation.json").write_text(json.dumps(content))
        (self.path / "identity.json").write_text("{}")
        done = {"state": "done", "evaluated": [*self._status().get("evaluated", []), self.evaluation_address]}
        (self.path / "status.json").write_text(json.dumps(done))
        return 0


class Making:
    what, was = "runs", "done and evaluated before"

    def __init__(self, root: Path, works: Callable[[Made], bool] = lambda made: True):
        self.root, self.works = root, works

    def compose(self, overrides: list[str]) -> None:
        for line in overrides:
            if line.endswith("=typo"):
                raise UserError(f"{line}: no such option")

    def job(self, overrides: list[str]) -> Made:
        made = Made(self.root, overrides)
        if not self.works(made):
            raise UserError("depth: too deep")
        return made

    def check(self, jobs: list[Made], overrides: Sequence[str]) -> None:
        assert len({(job.path, job.evaluation_address) for job in jobs}) == len(jobs)


class Stub(Launcher):
    """Makes runs, some a look or two after others where several may be in hand; remembers which."""

    poll_seconds = 0

    def __init__(self, root: Path, value: Callable[[dict[str, str]], float | None], jobs: int | None = None):
        super().__init__(jobs)
        self.root, self.value = root, value
        self.better, self.depends = "lower", lambda options: "3"
        self.made: list[dict[str, str]] = []
        self.at_once: list[int] = []
        self.killed_after, self.killed_by = 10**9, signal.SIGTERM

    def start(self, tasks: Sequence[Task]) -> list[Any]:
        return [[Made(self.root, task.arguments), len(self.made) % 3] for task in tasks]

    def poll(self, handle: Any) -> int | None:
        self.at_once.append(len(self.running))
        handle[1] -= 1
        if handle[1] >= 0 and self.jobs != 1:
            return None
        if len(self.made) >= self.killed_after:
            os.kill(os.getpid(), self.killed_by)
            return 128 + self.killed_by
        self.made.append(handle[0].options)
        return handle[0].make(self.value(handle[0].options), self.better, self.depends(handle[0].options))

    def stop(self, handles: Sequence[Any], signum: int) -> None:
        pass


def bowl(options: dict[str, str]) -> float:
    return (float(options["x"]) - 0.3) ** 2 + (float(options["y"]) + 0.6) ** 2


BOWL = ("x=interval(-1,1)", "y=interval(-1,1)")


def search(
    root: Path, overrides: Sequence[str] = BOWL, launcher: Stub | None = None, **options: Any
) -> list[dict[str, str]]:
    """What was made; the launcher's ``status`` is the command's."""
    launcher = launcher or Stub(root, bowl, 1)
    launcher.made = []
    works = options.pop("works", lambda made: True)
    asked = Options(retry=options.pop("retry", False), fail_fast=options.pop("fail_fast", False))
    launcher.status = Optuna("mmd2", **options).run(overrides, Making(root, works), launcher, asked)
    return launcher.made


MEMORY = "sqlite:///:memory:"


def test_tpe_finds_the_minimum_sooner_than_chance(tmp_path: Path):
    """What is left after 30 trials, a mean over two seeds."""
    left = {}
    for sampler in ("tpe", "random"):
        each = [
            search(tmp_path / f"{sampler}{k}", sampler=sampler, seed=k, trials=30, storage=MEMORY) for k in range(2)
        ]
        left[sampler] = fmean(min(map(bowl, made)) for made in each)
        assert all(len(made) == 30 for made in each)
    assert left["tpe"] < 0.01
    assert left["tpe"] < left["random"] / 2


def test_an_interruption_changes_no_draw(tmp_path: Path):
    how = {"trials": 10, "startup": 4}
    whole = search(tmp_path / "whole", **how)
    cut = Stub(tmp_path / "cut", bowl, 1)
    cut.killed_after = 6
    with pytest.raises(Interrupted):
        search(tmp_path / "cut", launcher=cut, **how)
    rest = search(tmp_path / "cut", **how)
    assert rest == whole[6:]
    assert len(rest) == 4
    assert search(tmp_path / "cut", **how) == []
    assert search(tmp_path / "cut", trials=11, startup=4) == search(tmp_path / "whole", trials=11, startup=4)
    assert search(tmp_path / "other", trials=2, startup=4, seed=1) != whole[:2]


KILLED = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_optuna import Stub, bowl, search
root = Path(sys.argv[1])
launcher = Stub(root, bowl, 1)
launcher.killed_after, launcher.killed_by = 3, signal.SIGKILL
search(root, launcher=launcher, trials=5, startup=2)
"""


def test_nothing_is_lost_where_the_command_is_killed(tmp_path: Path):
    cut, here = tmp_path / "cut", str(Path(__file__).parent)
    process = subprocess.run([sys.executable, "-c", KILLED, str(cut), here], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [*(cut / "runs" / ".searches").glob("*/run.lock")]
    rest, whole = search(cut, trials=5, startup=2), search(tmp_path / "whole", trials=5, startup=2)
    assert rest == whole[3:]


def test_a_trial_whose_runs_are_there_is_told_at_once(tmp_path: Path, capsys):
    """By another storage; and where options can only be repeated, they are not made again."""
    made = search(tmp_path, trials=3)
    assert search(tmp_path, trials=3, storage=f"sqlite:///{tmp_path}/other.db") == []
    capsys.readouterr()
    values = {"a": 3.0, "b": 1.0}
    launcher = Stub(tmp_path / "few", lambda options: values[options["x"]], None)
    made = search(tmp_path / "few", ["x=a,b"], launcher, trials=7, parallel=3)
    assert sorted(options["x"] for options in made) == ["a", "b"]
    assert launcher.status == 0
    err = capsys.readouterr().err
    assert err.count("mmd2 1; best 1 of trial") + err.count("mmd2 3; best") == 7
    assert "2 of 2 runs done" not in err  # those that another trial had made are said too
    assert "best: trial " in err
    assert "  denoiselab train x=b" in err


def test_a_trial_is_all_its_seeds(tmp_path: Path, capsys):
    """Its value is their mean, and failing one fails it."""

    def value(options: dict[str, str]) -> float | None:
        return None if options["x"] == "3" and options["seed"] == "1" else float(options["x"]) * int(options["seed"])

    launcher = Stub(tmp_path, value, None)
    launcher.better = "higher"
    made = search(tmp_path, ["seed=1,2", "x=choice(1,3,5)", "evaluation.seed=0,1"], launcher, trials=8, seed=3)
    assert sorted((o["x"], o["seed"]) for o in made if o["evaluation.seed"] == "0") == [
        (x, seed) for x in "135" for seed in "12"
    ]
    assert launcher.status == 1
    err = capsys.readouterr().err
    assert "failed: OSError: disk full" in err
    assert "best: " in err
    assert ": mmd2 7.5" in err.split("best: ")[-1]
    commands = [line for line in err.splitlines() if line.startswith("  denoiselab train")]
    assert commands == [f"  denoiselab train seed={s} x=5 evaluation.seed={e}" for s in (1, 2) for e in (0, 1)]


def test_slots_are_filled_as_they_come_free(tmp_path: Path):
    launcher = Stub(tmp_path, bowl, None)
    assert len(search(tmp_path, launcher=launcher, trials=9, parallel=3)) == 9
    assert max(launcher.at_once) == 3
    assert launcher.at_once.count(1) <= 4  # at the end; in batches it would be after every three
    bounded = Stub(tmp_path / "two", bowl, 2)
    search(tmp_path / "two", launcher=bounded, trials=5, parallel=3)
    assert max(bounded.at_once) == 2


def test_what_fails_does_not_end_the_search(tmp_path: Path, capsys):
    """Neither a run nor a combination that cannot work; both are named, and tried again where that is asked."""
    broken = True

    def value(options: dict[str, str]) -> float | None:
        return None if broken and float(options["x"]) < 0 else bowl(options)

    def works(made: Made) -> bool:
        return float(made.options["y"]) < 0.5

    launcher = Stub(tmp_path, value, 1)
    made = search(tmp_path, BOWL, launcher, trials=12, works=works)
    failed = [options for options in made if float(options["x"]) < 0]
    err = capsys.readouterr().err
    refused = [line for line in err.splitlines() if line.startswith("failed: trial") and "depth: too deep" in line]
    assert launcher.status == 1
    assert 0 < len(failed) < len(made)
    assert len(made) + len(refused) == 12
    assert refused

    assert search(tmp_path, BOWL, launcher, trials=12, works=works) == []
    assert launcher.status == 1
    again = capsys.readouterr().err
    assert again.count("it failed before; sweep.retry=true tries again") == len(failed) + len(refused)

    broken = False
    made = search(tmp_path, BOWL, launcher, trials=12, retry=True)
    assert launcher.status == 0
    assert [options for options in made if float(options["y"]) < 0.5] == failed
    assert len(made) == len(failed) + len(refused)
    assert search(tmp_path, BOWL, launcher, trials=12) == []
    assert launcher.status == 0

    launcher = Stub(tmp_path / "fast", lambda options: None, 1)
    assert len(search(tmp_path / "fast", BOWL, launcher, trials=12, fail_fast=True)) == 1
    assert launcher.status == 1


def test_numbers_that_do_not_compare_end_the_search(tmp_path: Path):
    launcher = Stub(tmp_path, bowl, 1)
    launcher.depends = lambda options: options["x"]
    with pytest.raises(UserError, match=r"sweeper\.metric=mmd2: numbers of trials do not compare, they differ in k; "):
        search(tmp_path, launcher=launcher, trials=9)
    assert len(launcher.made) == 2
    launcher = Stub(tmp_path / "none", bowl, 1)
    launcher.better = "none"
    with pytest.raises(UserError, match="neither direction of it is better"):
        search(tmp_path / "none", launcher=launcher)
    with pytest.raises(
        UserError, match=r"sweeper\.metric=fid: not measured; metrics= chooses what is, and it gave mmd2"
    ):
        Optuna("fid").run(BOWL, Making(tmp_path / "fid"), Stub(tmp_path / "fid", bowl, 1), Options())


def test_one_command_makes_a_search(tmp_path: Path):
    def value(options: dict[str, str]) -> float:
        with pytest.raises(RunHeld, match="another command makes this search"):
            search(tmp_path, trials=1)
        return bowl(options)

    search(tmp_path, launcher=Stub(tmp_path, value, 1), trials=1)


# ---- real runs


def test_a_search_of_real_runs(called, monkeypatch):
    """The value is the evaluation's, and the command makes the same run. Here runs are made in this process."""

    def make(launcher: Local, tasks: Sequence[Task]) -> list[int]:
        return [run(task.arguments) for task in tasks]

    monkeypatch.setattr(Local, "start", make)
    monkeypatch.setattr(Local, "poll", lambda launcher, status: status)
    words = ("train", "-m", *TINY, "sweeper=optuna", "sweeper.metric=held_out_loss", "seed=1")
    axes = ("optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.depth=range(1,3)")
    result = called(*words, *axes, "sweeper.trials=2")
    assert result.returncode == 0, result.stderr
    made = [Path(line) for line in result.stdout.split()]
    assert len({*made}) == 2
    values = {}
    for folder in made:
        [evaluation] = folder.glob("evaluations/*/evaluation.json")
        values[folder] = next(
            r["value"] for r in json.loads(evaluation.read_text())["records"] if r["name"] == "held_out_loss"
        )
    best = min(values, key=lambda folder: values[folder])
    again = called(*words, *axes, "sweeper.trials=2")
    assert again.returncode == 0
    assert again.stdout == ""
    *_, found, command, _ = again.stderr.splitlines()
    assert f": held_out_loss {values[best]:.6g}" in found
    assert not any(name in command for name in ("sweeper", "-m", "interval"))
    _, _, *alone = shlex.split(command)
    assert called("train", *alone).stdout.split() == [str(best)]


def test_wrong_searches_write_nothing(called, tmp_path: Path):
    words = ("train", "-m", *TINY, "sweeper=optuna")
    lr = "optimizer.lr=interval(1e-4,1e-2)"
    for more, says in (
        ((lr,), "sweeper.metric=???: this option must be given"),
        (("sweeper.metric=held_out_loss", "optimizer.lrr=interval(0,1)"), "no option 'lrr' here; did you mean lr?"),
        (("sweeper.metric=held_out_loss", "model.depth=interval(1,4)"), "model.depth=1.0: need a whole number"),
        (("sweeper.metric=held_out_loss", lr, "schedule=linear,cosin"), "did you mean cosine?"),
        (("sweeper.metric=held_out_loss", lr, "rerun=true"), "rerun=true: a search goes on"),
        (("sweeper.metric=held_out_loss", "trainer.max_steps=range(2,4)"), "this axis has no effect"),
    ):
        result = called(*words, *more)
        assert result.returncode == 2
        assert says in result.stderr.splitlines()[-1]
    assert not (tmp_path / "outputs").exists()


def test_ranks_get_the_options_of_the_trial(tmp_path: Path):
    """From one file, which is all that a launcher hands on."""
    words = [*TINY, "trainer=ddp_cpu", f"output_dir={tmp_path}", "optimizer.lr=0.0012345678901234567"]
    task = Training(None, here=True).job(words).task("trial 0")
    assert (task.ranks, task.nodes, task.arguments[:2]) == (2, 1, ["train", "--job"])
    assert len(task.arguments) == 3
    assert read_job(Path(task.arguments[2])).config.optimizer.lr == 0.0012345678901234567


def test_wrong_options_are_one_line(tmp_path: Path, monkeypatch):
    for options, says in (
        ({"trials": 0}, r"sweeper\.trials=0: need at least 1"),
        ({"parallel": 0}, r"sweeper\.parallel=0: need at least 1"),
        ({"startup": 0}, r"sweeper\.startup=0: need at least 1"),
        ({"sampler": "best"}, r"sweeper\.sampler=best: need tpe or random"),
        ({"storage": "nowhere://x"}, r"sweeper\.storage: "),
    ):
        with pytest.raises(UserError, match=says):
            search(tmp_path, **options)
    for overrides, says in ((["seed=0,1"], "nothing to search"), (["x=a,typo"], "x=typo: no such option")):
        with pytest.raises(UserError, match=says):
            search(tmp_path, overrides)
    with pytest.raises(UserError, match="too deep"):
        search(tmp_path, works=lambda made: False)
    assert not [*tmp_path.rglob("optuna.db")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'denoiselab\[optuna\]'"):
        Optuna("mmd2")
