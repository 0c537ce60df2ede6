"""Runs as processes on the nodes of a Ray cluster."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

from denoiselab.errors import UserError, one_line
from denoiselab.launcher.base import Launcher, Source, Task
from denoiselab.launcher.local import die_with_parent, kill_group

LISTENING = 0.5
"""Seconds for which a node waits for a run's next line before it answers without one; a signal waits no longer."""

ANSWER = 10.0
"""Seconds within which a cluster has to answer at its address."""

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No report to Ray's makers, no warning of a coming default."""

OWN = {"RAY_AUTH_MODE": "token", "RAY_kill_child_processes_on_worker_exit": "0"}
"""Of a cluster of one's own: nobody else can have programs run on it as this user; and where it ends without a word, a
run is told by the kernel to stop, which Ray would kill."""

STORE = 80 * 2**20
"""Bytes of shared memory of a cluster of one's own: lines are all that goes through it."""

Lines = list[tuple[bool, str]]
"""Whether each went to stderr."""


class Process:
    """A run, on the node that Ray placed this on: a process of its own, beside Ray's, so that one that dies hard takes
    only itself, and nothing heavy is imported where Ray's messages are answered.

    Every method but ``begin`` and ``look`` answers at once.
    """

    def ready(self) -> None:
        """Answered once there is room."""

    def begin(self, arguments: list[str], folder: str, threads: int, gpus: int) -> tuple[Lines, int | None]:
        """Start Python with these arguments, and look."""
        self.lines: queue.SimpleQueue[tuple[bool, str]] = queue.SimpleQueue()
        needed = [folder, *arguments[arguments.index("--job") + 1 :][:1]] if "--job" in arguments else [folder]
        if missing := next((path for path in needed if not Path(path).exists()), None):
            name = socket.gethostname()
            line = f"{name} has no {missing}; runs and the folder of the command must be where all nodes see them"
            return [(True, line + "\n")], 2
        # Ray's variables are for Ray's own processes, and one of them is the key of the cluster.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        given = {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ",".join(_allotted() if gpus else [])}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env={**kept, **given},
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_alone,
        )
        streams = [(False, self.process.stdout), (True, self.process.stderr)]
        self.pumps = [threading.Thread(target=self._pump, args=one, daemon=True) for one in streams]
        for pump in self.pumps:
            pump.start()
        return self.look()

    def _pump(self, is_error: bool, source: IO[str]) -> None:
        with source:
            for line in source:
                self.lines.put((is_error, line))

    def look(self) -> tuple[Lines, int | None]:
        """The lines since the last look, waiting a moment for one; and the exit status, with the last of them."""
        found: Lines = []
        with suppress(queue.Empty):
            found.append(self.lines.get(timeout=LISTENING))
        status = self.process.poll()
        if status is not None:
            if status:
                kill_group(self.process.pid)
            for pump in self.pumps:
                pump.join()
        with suppress(queue.Empty):
            while True:
                found.append(self.lines.get_nowait())
        return found, status

    def signal(self, signum: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signum)


def _allotted() -> list[str]:
    """The GPUs that Ray gave to this process, as CUDA_VISIBLE_DEVICES names them."""
    import ray

    return ray.get_runtime_context().get_accelerator_ids()["GPU"]


def _alone() -> None:
    """Ray blocks Ctrl-C in its own processes; and a run is told to stop when the one beside it dies."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    if sys.platform == "linux":
        die_with_parent()


@dataclass
class Placed:
    """A run that Ray was asked to place."""

    task: Task
    process: Any
    answer: Any
    """What is waited for."""
    begun: bool = False
    signals: list[int] = field(default_factory=list)
    """Not yet handed on."""


class Ray(Launcher):
    """Starts ``denoiselab`` once per task, on whatever node of a Ray cluster has room for it (Moritz et al. 2018,
    arXiv:1712.05889).

    Ray counts cores and GPUs; each process of a run gets ``cpus`` threads, and CUDA_VISIBLE_DEVICES names the GPUs that
    Ray gave. The environment is otherwise the one that Ray was started in on the node, and Python is Ray's own there.
    Ray repeats nothing that failed: the same command, issued again, does. Runs and the folder that the command is given
    in must be on a file system that all nodes see.

    Args:
        address: of the cluster, HOST:PORT, or ``auto`` for one that this machine is a node of; None for one of this
            machine, started for this command and stopped with it, which nobody else can use.
        jobs: runs handed to Ray at a time, whether or not there is room, so that a cluster that grows is asked to; None
            for as many as the nodes there are have room for.
        cpus: cores of each process of a run, >= 1.
    """

    program: ClassVar[Sequence[str]] = ("-m", "denoiselab")
    """For Python."""

    poll_seconds = 0.1

    def __init__(self, address: str | None = None, jobs: int | None = None, cpus: int = 1):
        super().__init__(jobs)
        if cpus < 1:
            raise UserError(f"launcher.cpus={cpus}: need at least 1")
        if address is not None and address != "auto" and (address.count(":") != 1 or "/" in address):
            raise UserError(
                f"launcher.address={address}: need HOST:PORT, auto, or null for a cluster of this command's own"
            )
        if importlib.util.find_spec("ray") is None:
            raise UserError("launcher=ray: needs the package ray; pip install 'denoiselab[ray]'")
        self.address, self.cpus = address, cpus
        self._nodes: list[tuple[float, float]] = []
        self._asked = float("-inf")

    @property
    def here(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.address is None

    def resources(self, task: Task) -> dict[str, int]:
        """What Ray is asked for, of one node."""
        if task.nodes > 1:
            raise UserError(f"trainer.nodes={task.nodes}: Ray places a run on one node; launcher=slurm runs on several")
        if task.gpus is None:
            raise UserError("trainer.devices=auto: say how many GPUs a run needs; Ray shares them out")
        return {"num_cpus": self.cpus * task.ranks, "num_gpus": task.gpus}

    def check(self, task: Task) -> None:
        need = self.resources(task)
        if self._grows or any(_inside(need, node) for node in self._room()):
            return
        cpus, gpus = (max((node[i] for node in self._room()), default=0) for i in (0, 1))
        raise UserError(
            f"launcher=ray: a run needs {need['num_cpus']} cores and {need['num_gpus']} GPUs of one node; they have "
            f"up to {cpus:g} and {gpus:g} (launcher.cpus, trainer.devices, trainer.accelerator=cpu)"
        )

    def fits(self, task: Task, beside: Sequence[Task]) -> bool:
        if self._grows:
            return True
        nodes = self._room()
        for one in [*self.running, *beside, task]:
            need = self.resources(one)
            at = next((i for i, node in enumerate(nodes) if _inside(need, node)), None)
            if at is None:
                return False
            nodes[at] = nodes[at][0] - need["num_cpus"], nodes[at][1] - need["num_gpus"]
        return True

    @property
    def _grows(self) -> bool:
        """Whether nodes may come that are not there yet."""
        return self.jobs is not None and self.address is not None

    def _room(self) -> list[tuple[float, float]]:
        """Cores and GPUs of every node, the largest first; asked for once a second."""
        import ray

        if time.monotonic() > self._asked + 1:
            found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._nodes = sorted(((node.get("CPU", 0), node.get("GPU", 0)) for node in found), reverse=True)
            self._asked = time.monotonic()
        return [*self._nodes]

    def run(self, source: Source) -> None:
        with self._connected():
            super().run(source)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Within, there is a cluster; afterwards nothing is left of one that was started."""
        before = dict(os.environ)
        folder = Path(tempfile.mkdtemp(prefix="denoiselab-ray-", dir="/tmp"))  # names of sockets have to be short
        os.environ.update(QUIET)
        if self.address is None:
            os.environ.update(OWN, RAY_AUTH_TOKEN=secrets.token_hex(32))
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        own = {"include_dashboard": False, "object_store_memory": STORE, "_temp_dir": str(folder / "ray")}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            import ray

            try:
                if self.address not in (None, "auto"):  # of which Ray would not tire
                    host, _, port = self.address.partition(":")
                    socket.create_connection((host, int(port)), timeout=ANSWER).close()
                ray.init(address=self.address or "local", **options, **({} if self.address else own))
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"launcher.address={self.address or 'null'}: {one_line(error)[:300]}") from None
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            yield
        finally:
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()
            os.environ.clear()
            os.environ.update(before)
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, tasks: Sequence[Task]) -> list[Placed]:
        import ray

        made = ray.remote(Process)
        placed = []
        for task in tasks:
            process = made.options(**self.resources(task), max_restarts=0, max_task_retries=0).remote()
            placed.append(Placed(task, process, process.ready.remote()))
        return placed

    def poll(self, handle: Placed) -> int | None:
        import ray
        from ray.exceptions import RayError

        if handle.signals and not handle.begun:
            ray.kill(handle.process)
            return -handle.signals[0]
        while handle.signals:
            handle.process.signal.remote(handle.signals.pop(0))
        if not ray.wait([handle.answer], timeout=0)[0]:
            return None
        try:
            answer = ray.get(handle.answer)
        except RayError as error:
            print(f"[{handle.task.label}] Ray lost this run: {one_line(error)[:300]}", file=sys.stderr, flush=True)
            return 1
        if answer is None:
            handle.begun = True
            words, gpus = [*self.program, *handle.task.arguments], handle.task.gpus
            handle.answer = handle.process.begin.remote(words, str(Path.cwd()), self.cpus, gpus)
            return None
        lines, status = answer
        for is_error, line in lines:
            sink, prefix = (sys.stderr, f"[{handle.task.label}] ") if is_error else (sys.stdout, "")
            print(prefix + line, end="", file=sink, flush=True)
        if status is None:
            handle.answer = handle.process.look.remote()
        else:
            ray.kill(handle.process)
        return status

    def withdraw(self) -> list[Task]:
        import ray

        waiting = [one for one in self.running.values() if not one.begun]
        for one in waiting:
            ray.kill(one.process)
        return [one.task for one in waiting]

    def stop(self, handles: Sequence[Placed], signum: int) -> None:
        """Only noted: Ray is not to be called from within a signal handler."""
        for one in handles:
            one.signals.append(signum)


def _inside(need: dict[str, int], node: tuple[float, float]) -> bool:
    return need["num_cpus"] <= node[0] and need["num_gpus"] <= node[1]
