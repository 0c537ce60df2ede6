#!/usr/bin/env bash
# Latent diffusion from pixels to decoded samples, on digits enlarged to 32x32: an autoencoder, its latents, a model of
# them. Options are passed on to the last command.
set -euo pipefail
cd "$(dirname "$0")/.."
denoiselab=.venv/bin/denoiselab
autoencoder=$($denoiselab train experiment=autoencoder_digits)
latents=outputs/latents/digits-$(basename "$autoencoder" | sed 's/.*-//')
$denoiselab encode data=digits data.size=32 encoder="$autoencoder" output="$latents" metrics=reconstruction_digits
$denoiselab train experiment=latent_digits data.root="$latents" "$@"
