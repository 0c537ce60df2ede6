"""Everything between two network calls of a sampler, against diffusers: input scaling, conversion and step.

The network answers one fixed tensor at once, so that what is timed is the arithmetic around it: ours is the denoiser's
input scaling and noise conditioning, the conversion of eps to x_0 and the sampler's step; theirs is
``scale_model_input`` and ``step``. Noise is drawn before, on both sides, and its cost is printed. Walks of the two
alternate inside a process; the figure is the median over processes of the ratio of medians.

    python scripts/bench_samplers.py [--processes 3] [--walks 15] [--threads 1] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import denoiselab  # isort: skip  # before torchvision: see denoiselab._torchvision

import torch
from torch import Tensor, nn

from denoiselab.denoiser import Denoiser
from denoiselab.run_folder import hardware, versions
from denoiselab.sampler.base import Denoise
from denoiselab.target import Eps

SHAPE, STEPS = (64, 3, 32, 32), 20
MOST = {"ddim": 0.8, "ddpm": 0.8, "dpmpp_2m": 0.5, "unipc": 0.5, "heun": 0.5}
"""The share of diffusers' time that each sampler may take."""


class Answers(nn.Module):
    """A network that answers the same eps at once."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = nn.Parameter(y)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.y


def theirs(name: str) -> Any:
    import diffusers

    common: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    make: dict[str, Callable[[], Any]] = {
        "ddim": lambda: diffusers.DDIMScheduler(**common, clip_sample=False, timestep_spacing="trailing"),
        "ddpm": lambda: diffusers.DDPMScheduler(**common, clip_sample=False, timestep_spacing="trailing"),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**common, timestep_spacing="trailing"),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**common, timestep_spacing="trailing"),
        "heun": lambda: diffusers.HeunDiscreteScheduler(**common, timestep_spacing="trailing"),
    }
    return make[name]()


@torch.no_grad()
def walk_of_theirs(name: str, y: Tensor, x: Tensor, noise: Tensor) -> float:
    """Seconds of one walk."""
    scheduler = theirs(name)
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps
    with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", return_value=noise):
        begin = time.perf_counter()
        for t in times:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(y, t, x).prev_sample
        return time.perf_counter() - begin


@torch.no_grad()
def walk_of_ours(name: str, denoiser: Denoiser, x: Tensor, noise: Tensor) -> float:
    parts = denoiselab.build("schedule=linear", f"sampler={name}", "spacing=trailing", f"sampler.steps={STEPS}")
    sampler, schedule = parts.sampler, parts.schedule
    levels, memory, denoise = sampler.levels(schedule), {}, Denoise(denoiser)
    begin = time.perf_counter()
    for t, s in itertools.pairwise(levels):
        x = sampler.step(denoise, x, t, s, schedule, lambda: noise, memory)
    return time.perf_counter() - begin


def measure(walks: int) -> dict[str, Any]:
    """Milliseconds per walk of each sampler, ours and theirs alternating; and of drawing the noise of one step."""
    torch.manual_seed(0)
    y, x, noise = (torch.randn(SHAPE) for _ in range(3))
    denoiser = Denoiser(Answers(y), Eps()).requires_grad_(False)
    begin = time.perf_counter()
    for _ in range(20):
        torch.randn(SHAPE)
    found: dict[str, Any] = {"noise_ms": 1e3 * (time.perf_counter() - begin) / 20}
    for name in MOST:
        pairs = [(walk_of_ours(name, denoiser, x, noise), walk_of_theirs(name, y, x, noise)) for _ in range(walks + 3)][
            3:
        ]
        found[name] = {"ours_ms": 1e3 * statistics.median(a for a, _ in pairs)}
        found[name]["theirs_ms"] = 1e3 * statistics.median(b for _, b in pairs)
        found[name]["ratio"] = found[name]["ours_ms"] / found[name]["theirs_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--walks", type=int, default=15, help=f"walks of {STEPS} steps per sampler and side")
    parser.add_argument("--threads", type=int, default=1, help="more are noisier, and drown the small operations")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.walks)))
        return

    command = [sys.executable, __file__, "--one", "--walks", str(options.walks), "--threads", str(options.threads)]
    runs = []
    for number in range(options.processes):
        print(f"process {number + 1} of {options.processes}", file=sys.stderr)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, Any] = {"shape": list(SHAPE), "steps": STEPS, "walks": options.walks}
    print(f"drawing the noise of one step: {statistics.median(run['noise_ms'] for run in runs):.2f} ms")
    print(f"{'sampler':10}{'ours ms/walk':>14}{'diffusers':>12}{'ratio':>8}{'range':>16}{'at most':>9}")
    for name, most in MOST.items():
        ratios = sorted(run[name]["ratio"] for run in runs)
        row = {
            "ours_ms": statistics.median(run[name]["ours_ms"] for run in runs),
            "theirs_ms": statistics.median(run[name]["theirs_ms"] for run in runs),
            "ratio": statistics.median(ratios),
            "range": [ratios[0], ratios[-1]],
            "at_most": most,
        }
        result[name] = row
        print(
            f"{name:10}{row['ours_ms']:14.2f}{row['theirs_ms']:12.2f}{row['ratio']:8.2f}"
            f"{ratios[0]:9.2f} to {ratios[-1]:.2f}{most:9.1f}"
        )
    result |= {"threads": torch.get_num_threads(), "hardware": hardware(), "versions": versions()}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
