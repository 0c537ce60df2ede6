"""Autoencoders: their networks, their loss and bottlenecks, and what a run of one can and cannot do."""

import json
import math

import pytest
import torch
from torch import Tensor

import denoiselab
from denoiselab.checks import check, check_used
from denoiselab.compose import compose
from denoiselab.data import Digits
from denoiselab.denoiser import Reconstructor, reconstructed
from denoiselab.errors import UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.loss import Reconstruction
from denoiselab.models import KL, VQ, Autoencoder
from denoiselab.target import X0
from exact import OPTIONS, normals, parts
from latents import TINY
from networks import NETWORKS, perturbed

AUTOENCODERS = [model for model in OPTIONS["model"] if model not in NETWORKS]
EVERY = pytest.mark.parametrize("model", AUTOENCODERS)


def build(model: str, shape: tuple[int, ...] = (1, 8, 8), **arguments) -> Autoencoder:
    torch.manual_seed(0)
    own = {**parts(f"model={model}", "loss=autoencoder").config["model"], **TINY, **arguments}
    return parts("loss=autoencoder").make("model", own, shape=shape)


def scalar(net: Autoencoder, image: Tensor) -> Tensor:
    found, penalty = net(image, penalty=True)
    return (found - image).square().mean() + penalty.mean()


def test_there_are_some():
    assert {"kl_digits", "vq_digits"} <= set(AUTOENCODERS)


@EVERY
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 24)])
def test_a_latent_is_smaller_by_f_and_an_image_comes_back(model, shape):
    net = build(model, shape)
    image = normals(2, *shape).float()
    mean, std = net.encode(image)
    assert mean.shape == (2, *net.latent_shape) == (2, 2, shape[1] // 2, shape[2] // 2)
    assert std is None or (std.shape == mean.shape and bool((std > 0).all()))
    assert net.decode(mean).shape == net(image).shape == image.shape
    assert float(net(image).detach().abs().max()) == 0, "what is new gives grey"


@EVERY
def test_every_weight_learns_and_samples_do_not_see_each_other(model):
    net = perturbed(build(model)).train()
    image = normals(4, 1, 8, 8)
    scalar(net, image).backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert still == []
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    net.eval()
    torch.testing.assert_close(net(image)[1:3], net(image[1:3]), rtol=1e-10, atol=1e-10)
    for one, other in zip(net(image, penalty=True), net(image[[1, 0, 2, 3]], penalty=True), strict=True):
        torch.testing.assert_close(one[[1, 0, 2, 3]], other, rtol=1e-10, atol=1e-10)


@EVERY
def test_in_evaluation_nothing_is_drawn_and_training_reconstructs_what_is_measured(model):
    net = perturbed(build(model)).eval()
    image = normals(3, 1, 8, 8)
    found, _ = net(image, penalty=True)
    torch.testing.assert_close(found, net(image), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, net(image, penalty=True)[0])


def test_the_kl_penalty_is_the_divergence_that_torch_computes():
    net = perturbed(build("kl_digits", weight=0.5), 0.2)
    assert isinstance(net, KL)
    image = normals(5, 1, 8, 8)
    mean, std = net.encode(image)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(net.bottleneck(image)[1], 0.5 * kl / 64, rtol=1e-12, atol=0)


def test_a_kl_latent_is_drawn_from_its_posterior_in_training():
    net = perturbed(build("kl_digits"), 0.2).train()
    image = normals(1, 1, 8, 8)
    mean, std = net.encode(image)
    torch.manual_seed(0)
    drawn, _ = net.bottleneck(image.expand(4000, -1, -1, -1))
    z = (drawn - mean) / std
    assert float(z.detach().mean(0).abs().max()) < 4 / math.sqrt(4000)
    assert float((z.detach().std(0) - 1).abs().max()) < 4 / math.sqrt(8000)


def test_the_nearest_code_by_hand_and_the_gradient_passes_through():
    net = build("vq_digits", codes=3).double()
    assert isinstance(net, VQ)
    net.codes.weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-2.0, 0.5]]).double()
    z = torch.tensor([[0.4, 0.4], [0.6, 0.6], [-1.2, 0.5]], dtype=torch.float64).T.view(1, 2, 1, 3)
    assert net.index(z).flatten().tolist() == [0, 1, 2]
    by_brute_force = (z.movedim(1, -1)[..., None, :] - net.codes.weight).square().sum(-1).argmin(-1)
    assert torch.equal(net.index(z), by_brute_force)
    net.encoder = torch.nn.Identity()
    z.requires_grad_()
    through, penalty = net.bottleneck(z)
    torch.testing.assert_close(through, net.quantised(z), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(through.sum() * 3, z, retain_graph=True)
    assert torch.equal(gradient, torch.full_like(z, 3.0))
    distance = (z - net.quantised(z)).square().mean()
    torch.testing.assert_close(penalty, (1.25 * distance)[None], rtol=1e-12, atol=0)
    to_codes, to_z = torch.autograd.grad(penalty.sum(), [net.codes.weight, z])
    torch.testing.assert_close(to_z, 0.25 * 2 * (z - net.quantised(z)) / 6, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(to_codes[1], 2 * (net.codes.weight[1] - 0.6) / 6, rtol=1e-10, atol=1e-12)


def test_a_decoded_latent_is_one_of_codes():
    net = perturbed(build("vq_digits"))
    assert isinstance(net, VQ)
    z = normals(2, *net.latent_shape)
    torch.testing.assert_close(net.decode(z), net.decoder(net.quantised(z)), rtol=0, atol=0)
    torch.testing.assert_close(net.decode(net.quantised(z)), net.decode(z), rtol=1e-10, atol=1e-10)


@EVERY
def test_the_loss_is_the_squared_error_and_the_penalty_whatever_the_noise(model):
    net = perturbed(build(model)).eval()
    denoiser, x_0 = Reconstructor(net, X0()), normals(4, 1, 8, 8)
    schedule = parts("loss=autoencoder").schedule
    loss, found = Reconstruction()(denoiser, schedule, x_0, normals(4, 1, 8, 8, seed=1), torch.rand(4, 1, 1, 1))
    x_0_hat, penalty = net(x_0, penalty=True)
    mse = (x_0_hat - x_0).square().mean((1, 2, 3))
    torch.testing.assert_close(found["mse"], mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, mse + penalty, rtol=1e-12, atol=0)
    assert not any(part.requires_grad for part in found.values())
    one = torch.ones(4, 1, 1, 1)
    assert torch.equal(denoiser(x_0, one, one), net(x_0))
    torch.testing.assert_close(reconstructed(denoiser, x_0, torch.device("cpu")), net(x_0).float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 6}, "multipliers=[1, 2]"),
        ({"multipliers": []}, "multipliers=[]"),
        ({"multipliers": [1, 1, 1, 1, 1]}, "multipliers=[1, 1, 1, 1, 1]"),
        ({"latent": 0}, "latent=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"groups": 0}, "groups=0"),
        ({"weight": -1}, "weight=-1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        build("kl_digits", **arguments)
    assert str(error.value).startswith(f"model.{message}: need ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=autoencoder", "model=unet_digits"], "model: the loss Reconstruction trains an autoencoder, and UNet"),
        (["model=kl_digits"], "model: KL is an autoencoder, and the loss WeightedLoss trains a denoiser"),
        (["loss=autoencoder", "metrics=digits", "model=vq_digits", "model.codes=1"], "model.codes=1"),
        (
            ["loss=autoencoder", "callbacks=default"],
            "callbacks.buckets: is about samples, and this loss trains an auto",
        ),
        (["callbacks=autoencoder"], "callbacks.reconstructions: is about an autoencoder, and this loss trains none"),
        (["loss=autoencoder", "data=8gaussians"], r"model.shape=\(2,\): need images"),
    ],
)
def test_a_loss_and_a_network_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=f"^{message}"):
        check(Parts(resolve(compose("train", overrides))))


@pytest.mark.parametrize("line", ["schedule=linear", "timesteps=uniform", "sampler=heun", "target=v", "weighting=snr"])
def test_what_has_no_effect_on_it_is_refused(line):
    composed = compose("train", ["loss=autoencoder", line])
    with pytest.raises(UserError, match=f"^{line}: the loss Reconstruction does not use a"):
        check_used(Parts(resolve(composed)), composed.overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from denoiselab.training import Job

    lines = [
        "loss=autoencoder",
        "model.channels=8",
        "debug=quick",
        "trainer.threads=1",
        "trainer.max_steps=3",
        "evaluation.n=1000",
    ]
    job = Job(compose("train", [*lines, f"output_dir={tmp_path_factory.mktemp('autoencoder')}"]))
    job.run()
    return job.folder.path


def test_a_run_is_measured_on_what_it_reconstructs(run):
    files = run.glob("evaluations/*/evaluation.json")
    file, found = next((f, made) for f in files if (made := json.loads(f.read_text()))["protocol"]["n"] == 360)
    records = {record["name"]: record for record in found["records"]}
    loaded = denoiselab.load(run)
    data = Digits()
    real = data.held_out.draw(1000)["x_0"]
    assert found["protocol"]["n"] == len(real) == 360
    assert found["protocol"]["made_of"] == ["held-out images"]
    with torch.no_grad():
        made = loaded.denoiser.net(real).clamp(-1, 1)
    assert records["mse"]["value"] == pytest.approx((made - real).square().mean().item(), rel=1e-4)
    assert records["held_out_loss"]["value"] >= records["mse"]["value"] * 0.99
    assert (file.parent / "samples.png").stat().st_size > 0
    assert list(run.glob("pictures/reconstructions_*.png"))


def test_it_is_measured_by_command_too(run, called):
    done = called("evaluate", f"ckpt={run}", "evaluation.n=12")
    assert done.returncode == 0, done.stderr
    files = [json.loads(path.read_text()) for path in run.glob("evaluations/*/evaluation.json")]
    assert {found["protocol"]["n"] for found in files} == {12, 360}
    refused = called("sample", f"ckpt={run}")
    assert refused.returncode == 2
    assert "trained an autoencoder" in refused.stderr


def test_its_page_says_what_was_measured(run, called):
    done = called("report", str(run))
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    assert "reconstructions of held-out images" in page
    assert "unknown sampler" not in page
    assert "weight on the x_0 error" not in page


def test_it_cannot_be_sampled(run):
    with pytest.raises(UserError, match=r"trained an autoencoder, which cannot be sampled; .denoiselab encode."):
        denoiselab.load(run).sample(n=1)


def test_what_is_kept_of_it_is_averaged_like_any_network(run):
    ema, raw = (denoiselab.load(run, weights) for weights in ("ema", "raw"))
    assert isinstance(ema.denoiser, Reconstructor)
    assert any(not torch.equal(a, b) for a, b in zip(ema.denoiser.parameters(), raw.denoiser.parameters(), strict=True))
