"""Whether anything is left behind by thousands of runs, or grows in a long one (`make soak`).

Three parts, in one folder: many short runs one after the other inside one process; some more in processes of their
own, as a sweep, whose command is then issued again and must make none; one long run, watched from outside. Every run
logs, draws, saves and is evaluated as runs do. Memory, threads and open files must not grow once the first runs, or
steps, have warmed the process up; a page and a table of all runs must still be made.

    python scripts/soak.py [--runs 1800] [--processes 200] [--steps 50000] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import denoiselab  # isort: skip  # before what imports torchvision: see denoiselab._torchvision

from denoiselab.compose import compose
from denoiselab.training import Job

assert denoiselab

RUN = (
    *("experiment=points", "data.n=256", "data.batch_size=16", "model.width=8", "model.depth=1", "trainer.threads=1"),
    *("evaluation.n=16", "sampler.steps=2", "lint.level=none", "callbacks.sample_grid.n=16"),
    "callbacks.guidance_sweep.n=4",
)
SHORT = (
    *("name=soak", "trainer.max_steps=20", "trainer.checkpoint_every=10", "trainer.log_every=5"),
    *("callbacks.buckets.every=10", "callbacks.sample_grid.every=20", "callbacks.guidance_sweep.every=20"),
)
LONG = (
    *("name=long", "trainer.checkpoint_every=1000", "trainer.log_every=50"),
    *("callbacks.buckets.every=500", "callbacks.sample_grid.every=1000", "callbacks.guidance_sweep.every=2000"),
)
WARM = 0.2
"""The share of the runs, or of the time, that warms a process up."""

GROWTH = {"many": 0.03, "long": 0.01}
"""How much more memory may be held at the end than when warm. Thousands of runs compose thousands of configurations
and fragment the heap; one run has no such excuse."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1800, help="inside one process")
    parser.add_argument("--processes", type=int, default=200, help="in processes of their own")
    parser.add_argument("--steps", type=int, default=50000, help="of the long run")
    parser.add_argument("--output", type=Path, help="a JSON file of the figures")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        parts = {
            "long": lambda: long(asked.steps),
            "many": lambda: many(asked.runs),
            "processes": lambda: processes(range(asked.runs, asked.runs + asked.processes)),
            "all": lambda: all_of_them(asked.runs + asked.processes),
        }
        found: dict[str, Any] = {}
        for part, watched in parts.items():
            found[part] = watched()
            print(json.dumps({part: found[part]}, indent=2), flush=True)
    wrong = [f"{part}: {line}" for part, figures in found.items() for line in figures.pop("wrong")]
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps({**found, "wrong": wrong}, indent=2) + "\n")
    for line in wrong:
        print(f"grew, or was left: {line}", file=sys.stderr)
    return bool(wrong)


def many(runs: int) -> dict[str, Any]:
    """Runs inside this process."""
    begin, seen = time.perf_counter(), []
    for seed in range(runs):
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            Job(compose("train", [*RUN, *SHORT, f"seed={seed}"])).run()
        seen.append(held(os.getpid()))
        tell("many", seed + 1, runs, begin)
    return {"runs": runs, "seconds": round(time.perf_counter() - begin), **judged(seen, "many")}


def processes(seeds: range) -> dict[str, Any]:
    """Runs as a sweep of processes; the command again makes none and changes no file."""
    begin, wrong = time.perf_counter(), []
    words = ["-m", *RUN, *SHORT, "launcher.jobs=2", f"seed={','.join(map(str, seeds))}"]
    first = call("train", *words)
    seconds, before = time.perf_counter() - begin, times()
    begin = time.perf_counter()
    again = call("train", *words)
    if first.returncode or again.returncode:
        wrong.append(f"status {first.returncode}, again {again.returncode}: {first.stderr[-300:]}{again.stderr[-300:]}")
    if times() != before:
        wrong.append("the command, issued again, changed files")
    return {
        "runs": len(seeds),
        "seconds": round(seconds),
        "seconds_again": round(time.perf_counter() - begin),
        "wrong": wrong,
    }


def times() -> dict[str, int]:
    """When each file of the runs was last written."""
    files = Path("outputs").glob("soak/[!.]*/**/*")
    return {str(path): path.stat().st_mtime_ns for path in files if path.is_file()}


def all_of_them(runs: int) -> dict[str, Any]:
    """The table and the page of all runs."""
    folder, begin, wrong = Path("outputs/soak"), time.perf_counter(), []
    done = [json.loads(file.read_text())["state"] == "done" for file in folder.glob("[!.]*/status.json")]
    if len(done) != runs or not all(done):
        wrong.append(f"{len(done)} runs, {sum(done)} of them done; asked for {runs}")
    left = [str(path) for path in folder.glob("[!.]*/**/*") if path.name.endswith((".tmp", ".lock"))]
    if left:
        wrong.append(f"{len(left)} files left, such as {left[0]}")
    status = call("status", str(folder))
    seconds = {"status": time.perf_counter() - begin}
    begin = time.perf_counter()
    report = call("report", str(folder))
    seconds["report"] = time.perf_counter() - begin
    wrong += [f"{said.args[3]}: {said.stderr[-300:]}" for said in (status, report) if said.returncode]
    page = folder / "report.html"
    return {
        "runs": runs,
        **{f"seconds_{name}": round(value, 1) for name, value in seconds.items()},
        "page_megabytes": round(page.stat().st_size / 1e6, 2) if page.is_file() else None,
        "wrong": wrong,
    }


def long(steps: int) -> dict[str, Any]:
    """One long run, watched every half second."""
    begin, seen, sizes = time.perf_counter(), [], []
    with Path("long.log").open("wb") as log:
        words = ["train", *RUN, *LONG, f"trainer.max_steps={steps}"]
        process = subprocess.Popen([sys.executable, "-m", "denoiselab", *words], stdout=log, stderr=log)
    while process.poll() is None:
        time.sleep(0.5)
        rows = next(Path("outputs/long").glob("[!.]*/metrics.jsonl"), None)
        if rows and process.poll() is None:
            step = last_step(rows)
            tell("long", step, steps, begin)
            if 0 < step < steps:  # what the evaluation at the end takes is another matter
                seen.append(held(process.pid))
                sizes.append((step, rows.stat().st_size, Path("long.log").stat().st_size))
    found = {"steps": steps, "seconds": round(time.perf_counter() - begin), **judged(seen, "long")}
    if process.returncode:
        found["wrong"].append(f"status {process.returncode}: {Path('long.log').read_text()[-300:]}")
        return found
    run = next(Path("outputs/long").glob("[!.]*"))
    warm, middle, end = (sizes[int(share * (len(sizes) - 1))] for share in (WARM, (1 + WARM) / 2, 1.0))
    for i, name in enumerate(("metrics", "console"), 1):
        before, after = ((b[i] - a[i]) / max(1, b[0] - a[0]) for a, b in ((warm, middle), (middle, end)))
        found |= {f"{name}_bytes_per_step": round(before, 2), f"{name}_bytes_per_step_later": round(after, 2)}
        if after > 1.1 * before + 0.1:
            found["wrong"].append(f"{name} grow faster: {before:.2f} bytes a step, later {after:.2f}")
    found["checkpoints"] = len([*run.glob("checkpoints/*.ckpt")])
    if found["checkpoints"] > 3:
        found["wrong"].append(f"{found['checkpoints']} checkpoints are kept")
    return found


def last_step(rows: Path) -> int:
    with rows.open("rb") as file:
        file.seek(max(0, rows.stat().st_size - 20_000))
        whole = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{")]
    return json.loads(whole[-1])["step"] if whole else 0


def held(pid: int) -> tuple[int, int, int]:
    """KiB of memory, threads and open files of a process."""
    said = Path(f"/proc/{pid}/status").read_text().splitlines()
    numbers = {line.split(":")[0]: line.split()[1] for line in said if line.startswith(("VmRSS", "Threads"))}
    return int(numbers["VmRSS"]), int(numbers["Threads"]), len([*Path(f"/proc/{pid}/fd").iterdir()])


def judged(seen: Sequence[tuple[int, int, int]], part: str) -> dict[str, Any]:
    """What was held when warm and at the end: medians of a tenth of the looks each."""
    tenth = max(1, len(seen) // 10)
    warm = seen[int(WARM * len(seen)) :][:tenth]
    found: dict[str, Any] = {"wrong": []}
    for i, name in enumerate(("memory", "threads", "files")):
        before, after = (statistics.median(look[i] for look in looks) for looks in (warm, seen[-tenth:]))
        growth = after / before - 1
        found |= {f"{name}_warm": before, f"{name}_end": after, f"{name}_growth": round(growth, 4)}
        if growth > (GROWTH[part] if name == "memory" else 0):
            found["wrong"].append(f"{name}: {before:.0f} when warm, {after:.0f} at the end")
    return found


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "denoiselab", *words], capture_output=True, text=True)


def tell(part: str, done: int, of: int, begin: float) -> None:
    """Progress, at most every five seconds."""
    now = time.perf_counter()
    if now - tell.last > 5:
        tell.last = now
        left = (now - begin) / max(1, done) * (of - done)
        print(f"{part}: {done} of {of}, {left / 60:.0f} minutes left", file=sys.stderr, flush=True)


tell.last = 0.0

if __name__ == "__main__":
    sys.exit(main())
