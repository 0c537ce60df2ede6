"""A run's directory: its address, its lock, and the small files that say what it is and how it stands."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from denoiselab.errors import RunHeld
from denoiselab.files import write_text
from denoiselab.launcher import queue

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "numpy",
    "scikit-learn",
)


BEAT, GONE = 20.0, 600.0
"""Seconds between signs of life of whoever holds a run, and after the last until it counts as gone."""


def digest(content: Any) -> str:
    """Ten hexadecimal digits that address a piece of plain data; 1 and 1.0 are the same."""
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _canonical(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _canonical(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_canonical(value) for value in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content


def slug(identity: dict[str, Any]) -> str:
    """A run directory's name: its classes and seed for people, its hash for certainty."""
    groups = ("data", "model", "schedule", "target", "weighting", "timesteps")
    names = [str(identity[group]["_target_"]).rpartition(".")[2].lower() for group in groups]
    loss = str(identity["loss"]["_target_"]).rpartition(".")[2].lower()
    names += [loss] if loss != "weightedloss" else []
    return "-".join([*names, f"s{identity['seed']}", digest(identity)])


def versions() -> dict[str, str]:
    """Of Python and the packages that results may depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("denoiselab", *PACKAGES)},
    }


def git_revision() -> str | None:
    """The commit of the folder that the command was given in, with "+" if it had changes; None outside git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> str:
    """The machine, in words."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} CPU cores ({platform.machine()})" + "".join(f", {gpu}" for gpu in gpus)


class RunFolder:
    """RUN/ with identity.json, config.yaml, record.json, status.json and run.lock.

    Args:
        path: the directory; made by ``open``.
        identity: what its result is determined by.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity = path, identity
        self.started, self.mine = time.time(), ""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; one process at a time. Taken over are locks of dead processes on this host, of SLURM jobs that
        have ended or were requeued since, and of hosts that gave no sign of life for ten minutes. Who finds its lock
        taken over, since it stood still for so long, ends at once with status 75.

        Raises:
            RunHeld: another process holds it.
        """
        self.started = time.time()
        self.path.mkdir(parents=True, exist_ok=True, mode=0o750)
        lock = self.path / "run.lock"
        self.mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "slurm": queue.mine()})
        while True:
            try:
                descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)
            except FileExistsError:
                self._take_over(lock)
            else:
                try:
                    with os.fdopen(descriptor, "w") as file:
                        file.write(self.mine)
                except OSError as error:  # a full disk: a lock that names nobody would keep others waiting
                    lock.unlink(missing_ok=True)
                    raise OSError(error.errno, error.strerror, str(lock)) from error
                break
        over = threading.Event()
        threading.Thread(target=self._beat, args=(lock, over), daemon=True, name="run-lock").start()
        try:
            yield
        finally:
            over.set()
            self.release()

    def _beat(self, lock: Path, over: threading.Event) -> None:
        """Say that this process holds the run, or find that it does not any more."""
        while not over.wait(BEAT):
            with suppress(OSError):  # a file system that is away for a while
                holder = lock.read_text()
                if holder and holder != self.mine and not over.is_set():
                    print(f"denoiselab: {self.path}: taken over by {holder}; this process ends", file=sys.stderr)
                    os._exit(RunHeld.status)
                os.utime(lock)

    def release(self) -> None:
        """Let go of the run."""
        lock = self.path / "run.lock"
        for _ in range(3):  # a stale handle of a network's file system is another one when it is opened again
            with suppress(OSError):
                if lock.exists() and lock.read_text() == self.mine:  # and not of one that was told to take it over
                    lock.unlink(missing_ok=True)
                return

    def _take_over(self, lock: Path) -> None:
        """Remove the lock of a dead process, or say who holds it."""
        try:
            with lock.open() as file:
                self._judge(lock, file)
        except FileNotFoundError:
            return

    def _judge(self, lock: Path, file: IO[str]) -> None:
        age = _clock(lock.parent) - os.fstat(file.fileno()).st_mtime
        try:
            holder = json.loads(file.read())
            if not isinstance(holder, dict):
                raise ValueError
        except (ValueError, RecursionError):  # being written this moment, or torn by a crash
            holder = {}
            if age < 5:
                time.sleep(0.1)
                return
        if queue.over(holder.get("slurm")):  # also where a process of another has its number now
            _remove(lock, file)
            return
        if holder.get("host") == socket.gethostname() and alive(holder.get("pid", -1)):
            raise RunHeld(f"{self.path}: process {holder['pid']} on {holder['host']} works on this run")
        if holder.get("host") not in (None, socket.gethostname()) and age < GONE:
            raise RunHeld(
                f"{self.path}: process {holder.get('pid')} on {holder['host']} works on this run, and gave a sign of "
                f"life {max(0, age):.0f} s ago; after {GONE:.0f} s without one the run is free"
            )
        _remove(lock, file)

    def describe(self, config_yaml: str, record: dict[str, Any]) -> None:
        """Write identity, configuration and record: who made this, with what."""
        write_text(self.path / "identity.json", json.dumps(self.identity, indent=2) + "\n")
        write_text(self.path / "config.yaml", config_yaml)
        made = {
            "git": git_revision(),
            "versions": versions(),
            "hardware": hardware(),
            **record,
        }
        write_text(self.path / "record.json", json.dumps(made, indent=2) + "\n")

    def revision(self) -> str | None:
        """The git revision that record.json names; None if it names none, or cannot be read."""
        found = _object(self.path / "record.json").get("git")
        return found if isinstance(found, str) else None

    def read_status(self) -> dict[str, Any]:
        """status.json; what is of another kind than ``status`` writes is left out."""
        kinds = {"state": str, "step": int, "max_steps": int, "evaluated": list, "evaluation": str, "error": str}
        found = _object(self.path / "status.json")
        found = {name: value for name, value in found.items() if isinstance(value, kinds.get(name, object))}
        return {**found, "evaluated": [one for one in found.get("evaluated", []) if isinstance(one, str)]}

    def status(
        self,
        state: str,
        step: int,
        max_steps: int,
        error: str | None = None,
        evaluated: Sequence[str] = (),
        evaluation: str | None = None,
    ) -> None:
        """Write status.json; state is running, done, failed or preempted.

        Args:
            state, step, max_steps, error: how the run stands.
            evaluated: addresses of the evaluations of this step.
            evaluation: address of the one that failed or was interrupted; None if that was not in an evaluation.
        """
        content = {
            "state": state,
            "step": step,
            "max_steps": max_steps,
            "error": error,
            "evaluated": [*evaluated],
            "evaluation": evaluation,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 1),
        }
        write_text(self.path / "status.json", json.dumps(content, indent=2) + "\n")

    def move_aside(self) -> Path | None:
        """Rename the directory to NAME.old-TIME, if it exists.

        Raises:
            RunHeld: a process works on it, which would go on in a directory that it makes anew.
        """
        if not self.path.exists():
            return None
        while (lock := self.path / "run.lock").exists():
            self._take_over(lock)
        aside = self.path.with_name(f"{self.path.name}.old-{datetime.now(UTC):%Y%m%dT%H%M%S}")
        return self.path.rename(aside)


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _remove(lock: Path, file: IO[str]) -> None:
    """Remove a lock, unless it is another's by now: of several processes that found it left behind, the first removes
    it and makes its own, which the others must not remove.

    Args:
        lock: its path.
        file: what was open when it was found so; the number of its inode is not given again until it is closed.
    """
    with suppress(OSError):  # file systems without it leave a moment between looking and removing
        fcntl.flock(file, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
            lock.unlink()


def _clock(folder: Path) -> float:
    """Now, by the clock of a folder's file system, which is what its files' times are of."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def alive(pid: Any) -> bool:
    """Whether a process of this machine is there; what is no number of a process is none."""
    if not (isinstance(pid, int) and pid > 0):
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
