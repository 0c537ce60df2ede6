"""Between two noises: closed forms of the way, exact ends, and how far neighbours are apart."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from denoiselab.diagnostics import EncodedInterpolation, Interpolation, InvertedInterpolation
from denoiselab.diagnostics.grid import grid
from denoiselab.diagnostics.interpolation import asks_for_noise, lerp, polar, slerp
from denoiselab.diagnostics.real_pairs import below, pairs
from denoiselab.pictures import tiles
from denoiselab.rng import Noise
from denoiselab.run import load
from denoiselab.sampler import DDIM, DDPM, Heun, Karras, Trailing, invert
from exact import make, normals
from healthy import subject
from walks import schedule_of


def rms(z: Tensor) -> float:
    return z.double().square().mean().sqrt().item()


def test_slerp_keeps_the_norm_and_lerp_does_not():
    """In closed form 1 and sqrt((1 - a)^2 + a^2); the angle is each sample's own."""
    z_0, z_1 = normals(16, 3, 32, 32), normals(16, 3, 32, 32, seed=1)
    for alpha in np.linspace(0, 1, 9).tolist():
        assert rms(slerp(z_0, z_1, alpha)) == pytest.approx(1, abs=0.01)
        assert rms(polar(z_0, z_1, alpha)) == pytest.approx(1, abs=0.01)
        assert rms(lerp(z_0, z_1, alpha)) == pytest.approx((alpha**2 + (1 - alpha) ** 2) ** 0.5, abs=0.01)
    assert rms(lerp(z_0, z_1, 0.5)) == pytest.approx(0.7071, abs=0.01)
    one = torch.cat([slerp(z_0[i : i + 1], z_1[i : i + 1], 0.3) for i in range(16)])
    torch.testing.assert_close(slerp(z_0, z_1, 0.3), one, rtol=0, atol=1e-14)
    a, b = (z[0].flatten() for z in (z_0, z_1))
    theta = torch.arccos(a @ b / (a.norm() * b.norm()))
    expected = ((0.7 * theta).sin() * a + (0.3 * theta).sin() * b) / theta.sin()
    torch.testing.assert_close(one[0].flatten(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", [lerp, slerp, polar])
def test_both_ends_are_exact_and_parallel_noises_are_no_exception(way):
    z_0, z_1 = normals(5, 2).float(), normals(5, 2, seed=1).float()
    assert torch.equal(way(z_0, z_1, 0.0), z_0)
    assert torch.equal(way(z_0, z_1, 1.0), z_1)
    torch.testing.assert_close(way(z_0, 2 * z_0, 0.5), 1.5 * z_0)


def test_rows_of_the_picture_are_samples_and_columns_alphas():
    """Cell (i, j) of 8 x 9 grey levels is where it belongs, not in the transpose."""
    levels = torch.arange(72).view(8, 9) / 72
    images = levels.view(8, 9, 1, 1, 1).expand(8, 9, 1, 8, 8)
    page = np.asarray(grid(images, ["row"] * 8, [f"{j}" for j in range(9)], "header"))[..., 0]
    inner = np.asarray(tiles(images.flatten(0, 1), 9))[..., 0]
    step = inner.shape[0] // 8
    found = page[-inner.shape[0] :]
    left = next(k for k in range(page.shape[1]) if np.array_equal(found[:, k : k + inner.shape[1]], inner))
    for i in range(8):
        for j in range(9):
            value = found[int((i + 0.5) * step), left + int((j + 0.5) * step)]
            assert value == round((levels[i, j].item() + 1) / 2 * 255)


def test_only_stochastic_samplers_ask_for_noise():
    schedule = schedule_of("cosine")
    asking = {
        name: asks_for_noise(make("sampler", name, steps=4), schedule) for name in ("ddim", "ddpm", "ddpm_learned")
    }
    assert asking == {"ddim": False, "ddpm": True, "ddpm_learned": True}
    assert not asks_for_noise(Heun(Karras(), 3), schedule)
    assert asks_for_noise(DDIM(Trailing(), 3, eta=0.5), schedule)


SAMPLERS = {
    "deterministic": (DDIM(Trailing(), 20), False),
    "shared": (DDPM(Trailing(), 60), True),
    "independent": (DDPM(Trailing(), 60), False),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_ends_are_samples_of_the_evaluation(kind: str, healthy: list[Path]):
    """Bit for bit: the first column is what the evaluation draws of the same ids; the last, of the next n noises."""
    sampler, shared = SAMPLERS[kind]
    seen = subject(healthy[0], sampler=sampler)
    n, diagnostic = 8, Interpolation(mode="polar", shared_noise=shared)
    found = diagnostic.look(seen)
    samples, cond = found.tensors["samples"], seen.cond(n)
    assert samples.shape == (n, 9, 2)
    assert torch.equal(samples[:, 0], seen.draw(n)[0])
    last = Noise(seen.seed, range(n, 2 * n), (2,))
    if shared:  # z_1 with the fresh noise of the first samples
        z_1, path = last(), Noise(seen.seed, range(n), (2,))
        path()
        draws = itertools.chain([z_1], iter(path, None))
        expected = sampler(seen.denoiser, seen.schedule, lambda: next(draws), **cond)
    else:
        expected = sampler(seen.denoiser, seen.schedule, last, **cond)
    assert torch.equal(samples[:, -1], seen.decode(expected))
    assert torch.equal(samples, diagnostic.look(seen).tensors["samples"])
    assert found.facts["stochastic"] == (kind != "deterministic")


def test_fresh_noise_makes_strangers_of_neighbours_and_one_path_does_not(healthy: list[Path]):
    """x_T hardly decides x_0 of a stochastic sampler; along a deterministic one the way is smooth."""
    ratios, smooth = {}, {}
    for kind, (sampler, shared) in SAMPLERS.items():
        found = Interpolation(n=24, mode="polar", shared_noise=shared).look(subject(healthy[0], sampler=sampler))
        records = {record.name: record.value for record in found.records}
        ratios[kind], smooth[kind] = records["interpolation_adjacent_ratio"], records["interpolation_smoothness"]
    assert ratios["independent"] > 0.8
    assert ratios["shared"] < 0.1 > ratios["deterministic"]
    assert smooth["deterministic"] < 0.5
    assert smooth["independent"] > 0.5


def test_images_are_interpolated_too(example_run: Path):
    found = Interpolation(n=3, columns=5).look(subject(example_run, "sampler.steps=2"))
    assert found.tensors["samples"].shape == (3, 5, 1, 8, 8)
    norms = found.table["norm"]
    assert all(abs(norm / norms[0] - 1) < 0.15 for norm in norms)
    lerped = Interpolation(n=3, columns=5, mode="lerp").look(subject(example_run, "sampler.steps=2"))
    assert lerped.table["norm"][2] == pytest.approx(lerped.table["norm_expected"][2], abs=0.1)


def test_real_pairs_have_one_class_and_are_noised_to_t(healthy: list[Path]):
    """At a level that is nearly clean the ends are the real samples; the walk starts at t, and takes what is below."""
    seen = subject(healthy[0], "sampler.steps=20")
    first, second, cond = pairs(seen, 12)
    held_out = seen.data.held_out
    assert held_out.label is not None
    for x_0 in (first, second):
        where = (held_out.x_0[:, None] == x_0).all(-1).nonzero()[:, 0]
        assert len(where) == 12
        assert sorted(held_out.label[where].tolist()) == sorted(cond["label"].tolist())
    assert not (first == second).all(-1).any()
    cut = below(seen.parts.sampler, seen.schedule, 0.42)
    times = cut.spacing(seen.schedule, cut.steps)
    torch.testing.assert_close(times[0].item(), 0.42, rtol=0, atol=1 / 999)
    own = seen.parts.sampler.spacing(seen.schedule, 20)
    assert torch.equal(times[1:], own[own < 0.42])
    near = EncodedInterpolation(t=0.02, n=6).look(seen)
    assert [record.protocol["t"] for record in near.records] == [0.02, 0.02]
    gap = near.tensors["samples"][:, [0, -1]].transpose(0, 1) - near.tensors["real"]
    far = EncodedInterpolation(t=0.9, n=6).look(seen)
    assert rms(gap) < 0.1 < rms(far.tensors["samples"][:, [0, -1]].transpose(0, 1) - far.tensors["real"])


def test_what_is_lost_there_and_back_falls_as_one_over_the_steps(healthy: list[Path]):
    seen = subject(healthy[0], "sampler.steps=64")
    found = InvertedInterpolation(n=8, mode="polar").look(seen)
    record = found.records[0]
    assert record.name == "inversion_error"
    assert record.details["slope"] < -0.8
    assert record.details["errors"] == sorted(record.details["errors"], reverse=True)
    assert record.value < 0.2 * record.controls["random_noise"]
    x_0, _, cond = pairs(seen, 8)
    z = invert(seen.parts.sampler, seen.denoiser, seen.schedule, x_0, **cond)
    again = seen.decode(seen.parts.sampler(seen.denoiser, seen.schedule, z, **cond))
    assert torch.equal(found.tensors["samples"][:, 0], again)
    assert rms(again - seen.decode(x_0)) == pytest.approx(record.value, rel=1e-6)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Interpolation(n=0), "n=0: need at least 1"),
        (lambda: Interpolation(columns=2), "columns=2: need at least 3"),
        (lambda: Interpolation(mode="cubic"), "mode=cubic: need one of lerp, slerp, polar"),
        (lambda: EncodedInterpolation(t=1), "t=1: need a time between 0, data, and 1, noise"),
    ],
)
def test_mistakes_are_named(made, says: str):
    with pytest.raises(ValueError, match=says):
        made()


def test_what_cannot_be_inverted_is_refused(healthy: list[Path]):
    run = load(healthy[0])
    for overrides, says in (
        (["sampler=ddpm", "sampler.steps=8"], "adds fresh noise"),
        (["sampler.steps=2"], "at least 4"),
    ):
        with pytest.raises(ValueError, match=says):
            InvertedInterpolation().check(subject(run, *overrides).parts)
    seen = subject(run)
    with pytest.raises(ValueError, match="n=9000: pairs of real samples need"):
        pairs(seen, 9000)
