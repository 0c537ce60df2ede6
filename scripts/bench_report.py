"""How long `denoiselab report` takes for a folder of many runs, and how large its page is.

The folder is made up, with files as training writes them: rows of losses, speed and errors by timestep, a sample grid
and findings of diagnostics at many steps, two evaluations per run, a configuration. Pictures are of the size of a
10 x 10 grid of 32 x 32 images. Each round is a process of its own, its start included.

    python scripts/bench_report.py [--runs 100] [--rows 500] [--rounds 3] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

SCHEDULES, RATES, WIDTHS, SEEDS = ("Cosine", "Linear"), (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3), (64, 128), 5
STEPS, CALLS = (10, 50), 500
LOOKS = ("confusion", "detectors", "gradient_noise", "guidance_sweep", "loss_by_t", "nearest", "steps", "trajectories")
BUCKETS = 10
PARAMETERS = {64: 9_000_000, 128: 35_700_000}


def make(folder: Path, runs: int = 100, rows: int = 500) -> None:
    """Runs of two schedules, five learning rates, two widths and five seeds, or as many of them as are asked for."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [grid(folder / f"picture-{i}.png", rng) for i in range(6)]
    arms = [(s, r, w) for s in SCHEDULES for r in RATES for w in WIDTHS]
    for i in range(runs):
        schedule, rate, width = arms[i // SEEDS % len(arms)]
        again = i // (SEEDS * len(arms)) * SEEDS  # more runs than combinations: more seeds
        one_run(folder / f"run{i:03d}", schedule, rate, width, i % SEEDS + again, rows, rng, kinds)
    for path in kinds:
        path.unlink()


def grid(path: Path, rng: np.random.Generator) -> Path:
    """10 x 10 pictures of 32 x 32, of blurred noise."""
    noise = Image.fromarray(rng.integers(0, 256, (320, 320, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1.2))
    noise.save(path)
    return path


def one_run(
    run: Path,
    schedule: str,
    rate: float,
    width: int,
    seed: int,
    rows: int,
    rng: np.random.Generator,
    pictures: list[Path],
) -> None:
    level = 1.0 + 0.2 * (schedule == "Linear") + 0.1 * abs(math.log2(rate / 4e-4)) - 0.15 * (width == 128)
    level *= 1 + 0.02 * rng.standard_normal()
    parts = ("data.CIFAR10", "target.V", "weighting.Unit", "timesteps.Stratified", "loss.WeightedLoss", "ema.EMA")
    identity: dict[str, Any] = {part.partition(".")[0]: {"_target_": f"denoiselab.{part}"} for part in parts}
    identity["data"]["batch_size"] = 128
    identity |= {
        "model": {"_target_": "denoiselab.models.UNet", "channels": width, "multipliers": [1, 2, 2, 2]},
        "schedule": {"_target_": f"denoiselab.schedule.{schedule}"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": rate, "betas": [0.9, 0.99]},
        "precision": "bf16-mixed",
        "seed": seed,
    }
    last = 50 * rows
    command = f"denoiselab train experiment=cifar10 schedule={schedule.lower()} optimizer.lr={rate} seed={seed}"
    files: dict[str, Any] = {
        "identity.json": identity,
        "status.json": {"state": "done", "step": last, "max_steps": last, "error": None, "seconds": 7200.0},
        "record.json": {
            "command": command,
            "git": "0123456789ab",
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "hardware": "NVIDIA H100",
            "parameters": PARAMETERS[width],
            "loss": "(SNR + 1) * mean |x_0_hat - x_0|^2",
            "weight": "SNR + 1",
            "choices": {"data": "cifar10", "model": "unet", "sampler": "ddim"},
        },
    }
    for name, content in files.items():
        write(run / name, json.dumps(content, indent=2))
    write(run / "config.yaml", config(schedule, rate, width, seed))
    write(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in logged(level, rows, width, rng)))
    for step in range(2500, last + 1, 2500):
        link(pictures[step // 2500 % len(pictures)], run / f"pictures/sample_grid_{step:08d}.png")
    for k, name in enumerate(LOOKS):
        for step in {last // 2, last}:
            look(run / f"diagnostics/{name}/{step:08d}-ab12cd34ef", level, pictures[(k + seed) % len(pictures)])
    for steps in STEPS:
        evaluation(run / f"evaluations/{steps:010d}", schedule, steps, last, level, rng, pictures[seed % len(pictures)])


def logged(level: float, rows: int, width: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Every 50 steps losses, every 100 the speed, and ten times less often the errors by timestep."""
    found: list[dict[str, Any]] = []
    t = (np.arange(BUCKETS) + 0.5) / BUCKETS
    scales = {"x_0": 1 + 0 * t, "eps": 1 / np.tan(t * np.pi / 2) ** 2, "v": 1 / np.sin(t * np.pi / 2) ** 2}
    for k in range(1, rows + 1):
        step, loss = 50 * k, float(level * (0.05 + np.exp(-k / 60)) * (1 + 0.03 * rng.standard_normal()))
        row = {
            "step": step,
            "train/loss": loss,
            "train/mse": loss / 2,
            "train/lr": 4e-4,
            "train/grad_norm": 1.25 * loss,
        }
        found.append(row | {"train/null_share": 0.1})
        if k % 2 == 0:
            rate = (40 if width == 64 else 14) * (1 + 0.02 * float(rng.standard_normal()))
            speeds = {"steps_per_second": rate, "samples_per_second": 128 * rate, "evaluation_share": 0.08}
            found.append({"step": step} | {f"speed/{name}": value for name, value in speeds.items()})
        if k % 10 == 0:
            row = {"step": step, "val/loss": 0.97 * loss, "val/loss_raw": 1.02 * loss}
            for source in ("train", "val", "val_raw"):
                row[f"buckets/{source}/count"] = [1000] * BUCKETS
                for unit, scale in scales.items():
                    mean = level * 0.2 * t**1.5 * scale * (1 + 0.03 * rng.standard_normal(BUCKETS))
                    row[f"buckets/{source}/{unit}"] = mean.tolist()
                    row[f"buckets/{source}/{unit}_se"] = (0.02 * mean).tolist()
            found.append(row)
    return found


def look(folder: Path, level: float, picture: Path) -> None:
    records = [{"name": "closeness", "value": 0.1 * level, "better": "lower", "controls": {"real": 0.05}}]
    finding = {"protocol": {"n": 500}, "records": records, "alarms": [], "table": {}}
    write(folder / "finding.json", json.dumps(finding))
    link(picture, folder / "picture.png")


def evaluation(
    folder: Path, schedule: str, steps: int, last: int, level: float, rng: np.random.Generator, picture: Path
) -> None:
    protocol = {
        "sampler": {"_target_": "denoiselab.sampler.DDIM", "_partial_": True, "steps": steps, "eta": 0.0},
        "spacing": {"_target_": "denoiselab.sampler.Trailing"},
        "guidance": {"_target_": "denoiselab.guidance.CFG", "_partial_": True, "scale": 1.0},
        "n": 5000,
        "seed": 0,
        "weights": "ema",
        "label_policy": "balanced",
        "nfe": float(steps),
        "step": last,
        "schedule": f"{schedule}:ab12",
        "trained_along": f"{schedule}:ab12",
        "versions": {"torch": "2.13.0"},
    }
    fd = 12 * level * (1 + 4 / steps) * (1 + 0.02 * float(rng.standard_normal()))
    measured = [("fid", fd, "lower", {"floor": 4.1, "floor_std": 0.05}), ("kid", fd / 1000, "lower", {})]
    measured += [(name, 1 - fd / 40, "higher", {"held_out": 0.82}) for name in ("precision", "recall", "coverage")]
    records = [
        {"name": name, "value": value, "better": better, "controls": controls, "protocol": {"n_real": 10_000}}
        for name, value, better, controls in measured
    ]
    write(folder / "evaluation.json", json.dumps({"protocol": protocol, "records": records, "seconds": 61.5}))
    link(picture, folder / "samples.png")


def config(schedule: str, rate: float, width: int, seed: int) -> str:
    """As long as a run's config.yaml."""
    head = f"seed: {seed}\nschedule:\n  _target_: denoiselab.schedule.{schedule}\noptimizer:\n  lr: {rate}\n"
    return head + f"model:\n  channels: {width}\n" + "".join(f"option_{i}:\n  argument: {i}\n" for i in range(100))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=500, help="of losses in metrics.jsonl, each 50 steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    seconds: list[float] = []
    work: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "runs"
        make(folder, options.runs, options.rows)
        read = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for _ in range(options.rounds):
            begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "denoiselab", "report", str(folder)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            work.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            print(f"{seconds[-1]:.2f} s; {work[-1]:.2f} s of a CPU", flush=True)
        size = (folder / "report.html").stat().st_size
    from denoiselab.run_folder import hardware, versions

    result = {
        "command": " ".join(["python", "scripts/bench_report.py", *sys.argv[1:]]),
        "runs": options.runs,
        "rows": options.rows,
        "folder_bytes": read,
        "seconds": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
        "cpu_seconds": statistics.median(work),
        "rounds": options.rounds,
        "page_bytes": size,
        "need": {"seconds_at_most": 20, "page_bytes_at_most": 15_000_000},
        "load_average": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions(),
    }
    print(f"median {result['seconds']['median']:.2f} s; page {size:,} bytes; {options.runs} runs of {read:,} bytes")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
