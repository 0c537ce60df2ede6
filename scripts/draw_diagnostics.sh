#!/usr/bin/env bash
# The pictures of docs/diagnostics.md: of the run on digits, and of one on points.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
pictures=docs/pictures/diagnostics
mkdir -p "$pictures"

draw() {
  local run=$1 name
  for name in "${@:2}"; do
    denoiselab evaluate "ckpt=$run" sampler.steps=20 rerun=true "diagnostics=$name"
    cp "$(ls -td "$run/diagnostics/$name"/*/ | head -1)picture.png" "$pictures/$name.png"
  done
}

digits=$(denoiselab train experiment=digits)
points=$(denoiselab train experiment=points)
draw "$digits" loss_by_t trajectories interpolation nearest coverage confusion
draw "$points" guidance_sweep quality_vs_steps score_field replacement
