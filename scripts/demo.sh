#!/usr/bin/env bash
# Train on real digits, sample, evaluate and report: about five minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
begin=$SECONDS

step() { printf '\n$ %s\n' "$*" >&2; "$@"; }

run=$(step denoiselab train experiment=digits)
step denoiselab evaluate -m "ckpt=$run" sampler=heun evaluation.seed=1,2
step denoiselab evaluate "ckpt=$run" sampler=heun guidance.scale=1.5
step denoiselab sample "ckpt=$run" sampler=ddim sampler.steps=20 guidance.scale=2
step python scripts/check_demo.py "$run"
page=$(step denoiselab report "$run")
printf '\n%s s in all. Open the page: %s\n' "$((SECONDS - begin))" "$PWD/$page"
