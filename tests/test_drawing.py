"""Samples from several devices: the same bits as from one, each made once, and all end together."""

import copy
import functools
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from denoiselab import drawing
from denoiselab.compose import compose, plain
from denoiselab.denoiser import Denoiser
from denoiselab.drawing import places, spread
from denoiselab.errors import Interrupted, UserError
from denoiselab.evaluation import evaluate
from denoiselab.guidance import Autoguidance
from denoiselab.rng import Noise
from denoiselab.run import Run, devices_of, load
from runs import trained

CPU = torch.device("cpu")
N = 23


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("denoiselab.run.BATCH", 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A run on points with classes."""
    return trained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(tiny) -> Run:
    return load(tiny)


def parts(run: Run, *overrides: str) -> Any:
    config = compose("evaluate", ["ckpt=none", f"evaluation.n={N}", "metrics=none", "sampler.steps=3", *overrides])
    return run.parts_for(plain(config))


@pytest.mark.parametrize(("others", "sampling"), [(1, "guidance.scale=2"), (2, "sampler=ddpm"), (9, "sampler=rk45")])
def test_samples_have_the_bits_that_one_device_gives(run, others, sampling):
    """Guided, stochastic, and with steps that a whole batch decides; on more devices than there are batches too."""
    used = parts(run, sampling)
    cond = run.cond(N)
    alone, calls = run.draw(used, cond, range(N), seed=3)
    together, same = run.to(CPU, *[CPU] * others).draw(used, cond, range(N), seed=3)
    assert torch.equal(alone, together)
    assert calls == same
    assert len(alone.flatten(1).unique(dim=0)) == N


def test_every_sample_is_drawn_once_and_both_devices_take_part(run, monkeypatch):
    """Each place waits for the other in its first batch, so that neither can take all."""
    drawn, threads, told = [], set(), []
    both = threading.Barrier(2, timeout=20)

    def noise(seed, ids, *args):
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            both.wait()
        drawn.extend(ids)
        return Noise(seed, ids, *args)

    monkeypatch.setattr(drawing, "Noise", noise)
    run.to(CPU, CPU).draw(parts(run), run.cond(N), range(100, 100 + N), progress=told.append)
    assert sorted(drawn) == [*range(100, 100 + N)]
    assert len(threads) == 2
    assert sorted(told) == [3, 4, 4, 4, 4, 4]
    assert threading.active_count() == 1


def test_places_share_no_network(run):
    """Not even one that a guidance holds, which follows x_t."""
    used, bad = parts(run), copy.deepcopy(run.denoiser)
    used.guidance = functools.partial(Autoguidance, bad=bad, scale=2.0)
    one, other = places(run.to(CPU, CPU), used, most=5)
    assert one.denoiser.denoiser is run.denoiser
    kept = {id(tensor) for tensor in (*run.denoiser.parameters(), *bad.parameters(), *run.codec.buffers())}
    networks = (other.denoiser.denoiser, other.denoiser.bad, other.codec, other.schedule)
    assert not kept & {id(t) for net in networks for t in (*net.parameters(), *net.buffers())}
    assert len(places(run, used, most=1)) == 1


class Failing(nn.Module):
    """A network that fails in any other thread than the main one, and lets that one go on meanwhile."""

    def __init__(self, net: nn.Module, steps: list[str]):
        super().__init__()
        self.net, self.steps = net, steps

    def __deepcopy__(self, memo):
        return Failing(copy.deepcopy(self.net, memo), self.steps)

    def forward(self, x, c_noise, **cond):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("out of memory on the second device")
        self.steps.append("main")
        time.sleep(0.02)
        return self.net(x, c_noise, **cond)


def test_an_error_on_one_device_ends_the_other_and_is_raised(tiny):
    run, steps = load(tiny), []
    run.denoiser = Denoiser(Failing(run.denoiser.net, steps), run.denoiser.target, run.denoiser.sigma_data).eval()
    used = parts(run, "sampler.steps=40")
    with pytest.raises(RuntimeError, match="out of memory on the second device"):
        run.to(CPU, CPU).draw(used, run.cond(N), range(N))
    assert len(steps) < 40
    assert threading.active_count() == 1


def test_whoever_is_told_may_end_it(run):
    """A look whose time is up."""
    told = []

    def tell(n: int) -> None:
        told.append(n)
        if len(told) == 2:
            raise TimeoutError("time is up")

    with pytest.raises(TimeoutError, match="time is up"):
        run.to(CPU, CPU).draw(parts(run), run.cond(N), range(N), progress=tell)
    assert 2 <= len(told) <= 3
    assert threading.active_count() == 1


@pytest.mark.parametrize("waiting", [False, True], ids=["while it works", "while it waits for the others"])
def test_an_interrupt_ends_all_at_once(waiting: bool, monkeypatch):
    steps = []

    def slow(item, go_on):
        for _ in range(1000):
            steps.append(item)
            time.sleep(0.01)
            go_on()

    def interrupt(signum, frame):
        raise Interrupted(signum)

    monkeypatch.setattr(threading, "excepthook", lambda *args: pytest.fail("a thread died"))
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    started = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            spread([(lambda item, go_on: None) if waiting else slow, slow], [1, 2] if waiting else [1, 2, 3], id)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 5
    assert len(steps) < 500
    assert threading.active_count() == 1


def test_results_are_in_the_order_of_the_items():
    def later(item, go_on):
        time.sleep(0.001 * (7 - item))
        return item

    assert spread([later, later, later], range(7), id) == [*range(7)]


def test_an_evaluation_on_two_devices_is_the_evaluation_on_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "folder", tmp_path)
    used = parts(run, "metrics=points", "guidance.scale=2")
    found = []
    for devices in ([CPU], [CPU, CPU]):
        folder = evaluate(run.to(*devices), used, rerun=True)
        content = json.loads((folder / "evaluation.json").read_text())
        found.append((folder, {**content, "seconds": 0}, (folder / "samples.png").read_bytes()))
    assert found[0] == found[1]
    assert found[0][1]["protocol"]["nfe"] == 3


def test_auto_is_all_gpus_or_those_that_a_trainer_was_given(monkeypatch):
    assert devices_of("auto") == devices_of("cpu") == [CPU]
    for wrong in ("cuda", "tpu"):
        with pytest.raises(UserError, match=f"device={wrong}: need one of auto, cpu, cuda"):
            devices_of(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    every = [0, 1, 2, 3]
    for chosen, want in ((None, every), ("auto", every), (-1, every), (1, [0]), (2, [0, 1]), ([1, 3], [1, 3])):
        for option in ("auto", "cuda"):
            assert devices_of(option, chosen) == [torch.device("cuda", number) for number in want]
    assert devices_of("cpu", 2) == [CPU]
