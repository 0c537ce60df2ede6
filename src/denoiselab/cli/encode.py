"""denoiselab encode"""

from __future__ import annotations

from denoiselab.cli import parse
from denoiselab.compose import compose, plain
from denoiselab.errors import UserError

ABOUT = """Turn the images of a data set into latents, for `denoiselab train data=latents data.root=OUTPUT`. OUTPUT
holds the latents, their mean and scale, the autoencoder, and what its reconstructions are worth.

    denoiselab encode data=digits data.size=32 encoder=outputs/autoencoder_digits/RUN output=outputs/latents/digits"""


def main(arguments: list[str]) -> int:
    overrides, config_dir, multirun = parse(arguments, "encode", ABOUT)
    if multirun:
        raise UserError("-m: encode writes one folder")
    config = plain(compose("encode", overrides, config_dir))

    from denoiselab.encoding import encode
    from denoiselab.experiment import Parts

    config["loss"] = {"_target_": "denoiselab.loss.Reconstruction"}  # what metrics will measure are reconstructions
    print(encode(Parts(config)), flush=True)  # alone on stdout, for scripts
    return 0
