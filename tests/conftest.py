"""What tests share: one tiny trained run, and the command line as a process."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import denoiselab  # isort: skip  # before anything that imports torchvision: see denoiselab._torchvision

import pytest
import torch

assert denoiselab

OWN = ("localhost", "127.0.0.1", "::1", "0.0.0.0", socket.gethostname())


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Other machines are not there: a test that passes does so without them. (For this process; what it starts, and
    what is not Python, is not seen.)"""
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    address = arguments[1] if event == "socket.connect" else arguments
    host = address[0] if isinstance(address, tuple) else None  # a path, of this machine
    if host is not None and str(host) not in OWN:
        raise OSError(errno.ENETUNREACH, f"{event}: tests have no network", str(host))


sys.addaudithook(_no_network)

pytest_plugins = ["ledger"]

QUICK = ["debug=quick", "metrics=none", "trainer.threads=1"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Train in this process; the run directory."""

    def run(*overrides: str, quick: tuple[str, ...] = tuple(QUICK), config_dir: Path | None = None) -> Path:
        from denoiselab.compose import compose
        from denoiselab.training import Job

        job = Job(compose("train", [*quick, f"output_dir={tmp_path / 'outputs'}", *overrides], config_dir))
        job.run()
        return job.folder.path

    return run


@pytest.fixture(scope="session")
def example_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits run of four steps, evaluated with every digits metric on 20 samples."""
    from denoiselab.compose import compose
    from denoiselab.training import Job

    folder = tmp_path_factory.mktemp("example")
    job = Job(compose("train", ["debug=quick", "trainer.threads=1", f"output_dir={folder}"]))
    job.run()
    return job.folder.path


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of five seeds on eight Gaussians that are well; trained once for all workers."""
    from healthy import all_trained

    base = tmp_path_factory.getbasetemp()
    return all_trained((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "healthy")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder of digits, in a folder."""
    from latents import autoencoder

    return autoencoder(tmp_path_factory.mktemp("autoencoder") / "kl")


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """Its latents of digits, in three shards."""
    from latents import encode

    return encode(tmp_path_factory.mktemp("latents") / "digits", encoder, "shard=500")


@pytest.fixture
def copy(encoded: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(encoded, tmp_path / "copy"))


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `denoiselab ...` as a process of its own in an empty folder."""

    def run(*arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "denoiselab", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        )

    return run


@pytest.fixture
def called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """The same in this process, which is sooner: torch and lightning are imported already."""
    from denoiselab.cli import run

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        capsys.readouterr()
        try:
            status = run([*arguments])
        except SystemExit as end:
            status = end.code
        assert isinstance(status, int)
        return subprocess.CompletedProcess([*arguments], status, *capsys.readouterr())

    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
