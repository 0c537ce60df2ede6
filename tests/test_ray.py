"""Runs on a Ray cluster: what Ray is asked for, and, marked ``ray``, a study on one that is real."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from denoiselab.errors import UserError
from denoiselab.launcher import Ray, Task
from denoiselab.launcher.ray import Process
from test_launcher import PROGRAM, gone, told, until
from test_ranks import OPTION, TELLING
from test_sweep import TINY, content, state


def task(folder: Path = Path("run"), **options: int | None) -> Task:
    return Task("1/1", [], folder, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("ranks", "gpus", "cpus", "asked"),
    [
        (1, 1, 1, {"num_cpus": 1, "num_gpus": 1}),
        (1, 0, 4, {"num_cpus": 4, "num_gpus": 0}),
        (2, 0, 3, {"num_cpus": 6, "num_gpus": 0}),
        (8, 8, 6, {"num_cpus": 48, "num_gpus": 8}),
    ],
)
def test_resources_follow_from_the_run(ranks: int, gpus: int, cpus: int, asked: dict[str, int]):
    assert Ray(cpus=cpus).resources(task(ranks=ranks, gpus=gpus)) == asked


def test_what_cannot_be_placed_is_refused(monkeypatch):
    for asked, line in (
        ({"nodes": 2}, r"trainer\.nodes=2: Ray places a run on one node; launcher=slurm"),
        ({"gpus": None}, r"trainer\.devices=auto: say how many GPUs"),
        ({"gpus": 3, "ranks": 3}, r"needs 3 cores and 3 GPUs of one node; they have up to 8 and 2 "),
        ({"ranks": 9}, r"needs 9 cores and 0 GPUs of one node"),
    ):
        for address in (None, "auto"):
            launcher = Ray(address)
            monkeypatch.setattr(launcher, "_room", lambda: [(8.0, 1.0), (4.0, 2.0)])
            with pytest.raises(UserError, match=line):
                launcher.check(task(**asked))


def test_a_run_waits_for_room_on_a_single_node(monkeypatch):
    """Three cores are free in all, and two of them on no node."""
    launcher = Ray(cpus=2)
    monkeypatch.setattr(launcher, "_room", lambda: [(3.0, 0.0), (3.0, 0.0), (1.0, 1.0)])
    one, two, three = (task(Path(str(k))) for k in range(3))
    launcher.running = {one: None}
    assert launcher.fits(two, [])
    assert not launcher.fits(three, [two])
    assert not launcher.fits(task(gpus=1), [])
    growing = Ray("auto", jobs=9)  # Ray is to be asked for more than there is
    monkeypatch.setattr(growing, "_room", list)
    growing.check(three)
    assert growing.fits(three, [one, two])


def test_wrong_options_are_one_line(monkeypatch):
    for options, line in (
        ({"cpus": 0}, r"launcher\.cpus=0: need at least 1"),
        ({"jobs": 0}, r"launcher\.jobs=0: need at least 1"),
        ({"address": "ray://there:1"}, r"launcher\.address=ray://there:1: need HOST:PORT, auto, or null"),
    ):
        with pytest.raises(UserError, match=line):
            Ray(**options)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'denoiselab\[ray\]'"):
        Ray()


def test_a_node_that_does_not_see_the_job_says_so(tmp_path: Path):
    for words, folder, missing in (
        (["train", "--job", "/no/job.json"], str(tmp_path), "/no/job.json"),
        (["train"], "/no/folder", "/no/folder"),
    ):
        lines, status = Process().begin(words, folder, 1, 0)
        assert status == 2
        assert len(lines) == 1
        assert f"has no {missing}; runs and the folder of the command must be where all nodes see them" in lines[0][1]


def test_a_run_has_its_threads_and_none_of_rays_variables(tmp_path: Path, monkeypatch):
    """Nor the blocked signals of Ray's processes; all its lines come, and its status."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary")
    script = "import os, signal, sys; print(dict(os.environ)); print('x', file=sys.stderr); signal.pause()"
    process, found = Process(), []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        lines, status = process.begin(["-c", script], str(tmp_path), 3, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    while status is None:
        found += lines
        if len(found) == 2:
            process.signal(signal.SIGINT)
        lines, status = process.look()
    out, err = ("".join(line for is_error, line in [*found, *lines] if is_error is which) for which in (False, True))
    assert status == -signal.SIGINT
    assert "'OMP_NUM_THREADS': '3'" in out
    assert "'CUDA_VISIBLE_DEVICES': ''" in out
    assert "RAY_" not in out
    assert err.startswith("x\n")
    assert "KeyboardInterrupt" in err


def test_a_worker_imports_nothing_heavy():
    script = (
        "import sys, denoiselab.launcher.ray; print(sorted({'torch', 'lightning', 'hydra', 'ray'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- a real cluster


def denoiselab(root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "denoiselab", "train", "-m", *TINY, *arguments],
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def by_name(root: Path) -> dict[str, Path]:
    """Run directories by schedule and seed."""
    found = {}
    for path in root.glob("outputs/runs/*/identity.json"):
        identity = json.loads(path.read_text())
        found[f"{identity['schedule']['_target_'].rpartition('.')[2].lower()} {identity['seed']}"] = path.parent
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def ray_is_gone() -> bool:
    """No folder, and no process that was started with one."""
    words = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return not any(b"denoiselab-ray-" in line for line in words) and not [*Path("/tmp").glob("denoiselab-ray-*")]


STUDY = ("schedule=linear,cosine", "seed=0,1")


@pytest.mark.ray
def test_a_study_of_which_one_run_is_killed(tmp_path: Path):
    process = denoiselab(tmp_path, "launcher=ray", *STUDY)
    until(lambda: "linear 1" in by_name(tmp_path), 120)  # identity.json is written just before training
    run = by_name(tmp_path)["linear 1"]
    os.kill(json.loads((run / "run.lock").read_text())["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "3 of 4 runs done" in err
    assert "failed: schedule=linear seed=1: killed by signal 9" in err.splitlines()[-1]
    assert sorted(Path(line).name for line in out.split()) == sorted(
        path.name for name, path in by_name(tmp_path).items() if name != "linear 1"
    )
    assert all(line.startswith(("[", "4 of 4", "3 of 4", "failed")) for line in err.splitlines()), err  # Ray is silent
    assert ray_is_gone()

    others = {name: content(path) for name, path in by_name(tmp_path).items() if name != "linear 1"}
    assert sorted(others) == ["cosine 0", "cosine 1", "linear 0"]
    process = denoiselab(tmp_path, "launcher=ray", *STUDY, "sweep.retry=true")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "1 of 4 runs to make" in err
    assert {name: content(path) for name, path in by_name(tmp_path).items() if name != "linear 1"} == others
    assert state(run) == "done"
    assert ray_is_gone()

    (here := tmp_path / "here").mkdir()
    process = denoiselab(here, "schedule=linear", "seed=1")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    one, other = weights(run), weights(by_name(here)["linear 1"])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.ray
def test_ctrl_c_saves_a_run_of_two_ranks(tmp_path: Path):
    (tmp_path / "lab" / "callbacks").mkdir(parents=True)
    (tmp_path / "lab" / "telling.py").write_text(TELLING)
    (tmp_path / "lab" / "callbacks" / "telling.yaml").write_text(OPTION)
    words = (
        "--config-dir=lab",
        "callbacks=telling",
        "trainer=ddp_cpu",
        "trainer.threads=1",
        "trainer.max_steps=1000000",
    )
    process = denoiselab(tmp_path, "launcher=ray", *words)
    until(lambda: len([*tmp_path.glob("outputs/runs/*/rank*.json")]) == 2, 200)
    [run] = by_name(tmp_path).values()
    pid = json.loads((run / "run.lock").read_text())["pid"]
    ranks = [json.loads(path.read_text()) for path in sorted(run.glob("rank*.json"))]
    assert ranks == [{"world": 2, "text": "", "rank": rank} for rank in (0, 1)]
    group = [int(path.name) for path in Path("/proc").glob("[0-9]*") if of(path, pid)]
    assert len(group) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all that it started
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "stopped by signal 2" in err.splitlines()[-1]
    assert state(run) == "preempted"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert all(map(gone, group))
    assert ray_is_gone()


def of(process: Path, leader: int) -> bool:
    """Whether a process of /proc is of a group."""
    try:
        return os.getpgid(int(process.name)) == leader
    except ProcessLookupError:
        return False


LAUNCHING = """
import json, sys
from pathlib import Path
from denoiselab.errors import Interrupted
from denoiselab.launcher import Ray, Task
sys.path.insert(0, sys.argv[3])
from test_launcher import run
Ray.program = (sys.argv[1],)
options, asked, go_on = map(json.loads, sys.argv[4:])
tasks = [
    Task(str(k), [f"{sys.argv[2]}/r{k}", *words], Path(f"r{k}"), gpus=gpus) for k, (gpus, *words) in enumerate(asked)
]
try:
    print(json.dumps(run(Ray(**options), tasks, go_on)))
except Interrupted as stop:
    sys.exit(stop.status)
"""


def launched(
    root: Path, asked: list[tuple[int, str, str]], go_on: bool = True, **options: object
) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    (root / "program.py").write_text(PROGRAM)
    words = [str(root / "program.py"), str(root / "runs"), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHING, *words, *map(json.dumps, (options, asked, go_on))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said_by_a_stranger() -> str:
    """The first that Ray says to a process without the token of the cluster."""
    lines = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    address = next(found[1] for line in lines if (found := re.search(r"gcs[-_]address=([\d.]+:\d+)", line)))
    script = f"import ray; ray.init(address={address!r}); print('connected')"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as stranger:
        assert stranger.stdout is not None
        said = next((line.decode() for line in stranger.stdout if b"uthenticat" in line or b"connected" in line), "")
        stranger.kill()
    return said


@pytest.mark.ray
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_no_run_outlives_the_launching_process(signum: int, tmp_path: Path):
    """A third, which waits for room, is not begun; and nobody else can use the cluster."""
    process = launched(tmp_path, [(0, "60", "0")] * 3)
    until(lambda: len(told(tmp_path / "runs")) == 2, 60)
    if signum == signal.SIGTERM:
        assert "Authentication token is missing" in said_by_a_stranger()
    pids = [facts["pid"] for facts in told(tmp_path / "runs")]
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == (128 + signum if signum == signal.SIGTERM else -signum)
    until(lambda: all(map(gone, pids)), 60)
    assert [path.read_text() for path in (tmp_path / "runs").rglob("stopped*")] == [str(int(signal.SIGTERM))] * 2
    assert not (tmp_path / "runs" / "r2").exists()
    if signum == signal.SIGKILL:  # nobody is left who could remove it
        for folder in Path("/tmp").glob("denoiselab-ray-*"):
            subprocess.run(["rm", "-r", folder], check=False)
    until(ray_is_gone, 60)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """One that was there before, with two GPUs that Ray believes in."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 2, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.ray
def test_a_cluster_that_is_there_is_used_and_left(cluster, tmp_path: Path):
    """GPUs are not shared; the worker that stands for a run may die, which is that run's failure alone."""
    process = launched(tmp_path, [(1, "2", "0"), (1, "2", "3"), (1, "1", "0"), (0, "60", "0")], address=cluster.address)
    until(lambda: (tmp_path / "runs" / "r3").exists(), 60)
    pid = told(tmp_path / "runs" / "r3")[0]["pid"]
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert json.loads(out.splitlines()[-1]) == {"0": 0, "1": 3, "2": 0, "3": 1}, err
    assert "[3] Ray lost this run: " in err
    until(lambda: gone(pid))
    facts = told(tmp_path / "runs")
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in facts) in (["", "0", "0", "1"], ["", "0", "1", "1"])
    for one in (one for one in facts if one["CUDA_VISIBLE_DEVICES"]):
        beside = [o for o in facts if o is not one and "to" in o and o["from"] <= one["from"] < o["to"]]
        assert one["CUDA_VISIBLE_DEVICES"] not in [o["CUDA_VISIBLE_DEVICES"] for o in beside]

    words = [(0, "0", "1"), (0, "0", "0"), (0, "0", "0")]  # all handed to Ray, which has room for one
    again = launched(tmp_path / "again", words, go_on=False, address=cluster.address, jobs=3, cpus=4)
    out, err = again.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1]) == {"0": 1}, err
    assert [path.name for path in (tmp_path / "again" / "runs").iterdir()] == ["r0"]


@pytest.mark.ray
def test_a_node_that_is_lost_fails_its_run(cluster, tmp_path: Path):
    node = cluster.add_node(num_cpus=8)
    process = launched(tmp_path, [(0, "60", "0")], address=cluster.address, cpus=6)
    until((tmp_path / "runs" / "r0").exists, 60)
    cluster.remove_node(node, allow_graceful=False)
    out, err = process.communicate(timeout=90)
    assert json.loads(out.splitlines()[-1]) == {"0": 1}, err
    assert "[0] Ray lost this run: " in err


@pytest.mark.ray
def test_no_cluster_at_an_address_is_one_line(tmp_path: Path):
    begun = time.monotonic()
    process = denoiselab(tmp_path, "launcher=ray", "launcher.address=127.0.0.1:9", "trainer.accelerator=cpu", "seed=0")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert "launcher.address=127.0.0.1:9: " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert time.monotonic() - begun < 60
