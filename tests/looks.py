"""Every diagnostic in a small version, for the tests that hold for all of them."""

from __future__ import annotations

SMALL: dict[str, tuple[str, list[str]]] = {
    "confusion": ("digits", ["diagnostics.confusion.n=20", "sampler.steps=2"]),
    "coverage": ("digits", ["diagnostics.coverage.n=20", "sampler.steps=2"]),
    "nearest": ("digits", ["diagnostics.nearest.n=20", "sampler.steps=2"]),
    "encoded_interpolation": ("points", ["sampler.steps=4"]),
    "forward": ("points", []),
    "guidance_sweep": (
        "digits",
        [
            *("metrics=digits", "~metrics.frechet", "~metrics.neighbours", "sampler.steps=1"),
            *("diagnostics.guidance_sweep.scales=[1,2]", "diagnostics.guidance_sweep.n=20"),
            *("diagnostics.guidance_sweep.repeats=1", "diagnostics.guidance_sweep.shown=3"),
        ],
    ),
    "interpolation": ("digits", ["sampler.steps=2", "diagnostics.interpolation.n=3"]),
    "inverted_interpolation": ("points", ["sampler.steps=4"]),
    "quality_vs_steps": (
        "points",
        [
            *("metrics=points", "~metrics.modes", "diagnostics.quality_vs_steps.n=50"),
            *("diagnostics.quality_vs_steps.steps=[1,2]", "diagnostics.quality_vs_steps.repeats=1"),
        ],
    ),
    "trajectories": ("points", ["sampler.steps=4", "diagnostics.trajectories.left=[1,0]"]),
    "best_target": ("points", ["diagnostics.best_target.n=100"]),
    "loss_curve": ("points", []),
    "mismatch": ("points", ["diagnostics.mismatch.n=64"]),
    "embedding": ("points", []),
    "likelihood": ("points", [f"diagnostics.likelihood.{x}" for x in ("n=20", "points=20", "tolerance=0.01")]),
    "loss_by_t": ("points", ["diagnostics.loss_by_t.n=200"]),
    "replacement": ("points", ["diagnostics.replacement.n=32", "diagnostics.replacement.steps=10"]),
    "influence": (
        "digits",
        [
            *("diagnostics.influence.n=4", "diagnostics.influence.steps=3"),
            "diagnostics.influence.levels=2",
        ],
    ),
    "score_field": ("points", ["diagnostics.score_field.n=50", "diagnostics.score_field.times=[0.5]"]),
    "gradient_noise": ("points", ["diagnostics.gradient_noise.n=512", "diagnostics.gradient_noise.repeats=4"]),
    "timestep_variance": (
        "points",
        [
            "diagnostics.timestep_variance.samplers=[uniform,stratified]",
            *("diagnostics.timestep_variance.gradients=8", "diagnostics.timestep_variance.losses=16"),
        ],
    ),
    "interference": (
        "points",
        [
            *(
                "diagnostics.interference.slots=2",
                "diagnostics.interference.steps=2",
                "diagnostics.interference.seeds=1",
            ),
            *("diagnostics.interference.n=32", "diagnostics.interference.gradient_n=64"),
        ],
    ),
}
"""By option: the kind of run ("points": one of ``healthy``; "digits": ``example_run``), and overrides that make it
quick."""
