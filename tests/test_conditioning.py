"""Labels and free vectors as conditions, and what "no condition" is for training and guidance alike."""

import math
from pathlib import Path

import pytest
import torch

import denoiselab
from denoiselab.compose import compose, plain
from denoiselab.conditioning import NULL, Drop, null
from denoiselab.data.base import Batch, Data, Samples
from denoiselab.data.codec import Standardise
from denoiselab.denoiser import Denoiser
from denoiselab.errors import UserError
from denoiselab.guidance import CFG
from denoiselab.models import MLP
from denoiselab.models.layers import Conditioner
from denoiselab.schedule import Cosine
from exact import make, normals, parts
from networks import perturbed

SIGN = torch.tensor([1.0, -1.0])


class Told(Samples):
    """Points that their label and their vector say all of."""

    def __init__(self, vector: torch.Tensor, label: torch.Tensor, ids: torch.Tensor):
        super().__init__(SIGN[label][:, None] * vector[:, :2], label, ids)
        self.vector = vector

    def batch(self, index: torch.Tensor | slice) -> Batch:
        found = super().batch(index)
        return {**found, "cond": {**found["cond"], "vector": self.vector[index]}}


class Vectors(Data):
    """x_0 = +-(first two entries of a normal vector of four), the sign by a label of two."""

    shape, num_classes, vector, codec = (2,), 2, 4, Standardise([0.0, 0.0], 1.0)

    def __init__(self, batch_size: int = 256, workers: int = 0):
        super().__init__(batch_size, workers)
        vector, label = normals(4096, 4).float(), torch.arange(4096) % 2
        self.train = Told(vector[:3584], label[:3584], torch.arange(3584))
        self.held_out = Told(vector[3584:], label[3584:], torch.arange(3584, 4096))


def test_a_network_learns_what_label_and_vector_say_and_what_is_left_without(train, tmp_path: Path, monkeypatch):
    """Both are dropped together in a tenth of the samples. At a level with little of the data in it: told, it knows
    x_0; told nothing, no more than a Wiener filter does, sigma^2/(alpha^2 + sigma^2). Samples follow what they are
    asked for, with guidance scale 1, and with 0 do not."""
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "vectors.yaml").write_text("_target_: test_conditioning.Vectors\nbatch_size: 256\n")
    monkeypatch.setenv("DENOISELAB_ALLOW_TARGETS", "test_conditioning.Vectors")
    options = ["data=vectors", "model=mlp", "model.width=64", "model.depth=2", "optimizer.lr=5e-3", "callbacks=none"]
    options += ["trainer.max_steps=300", "ema.decay=0.98", "trainer.log_every=300"]
    run = denoiselab.load(train(*options, config_dir=tmp_path / "own"))
    assert run.denoiser.net.condition.null_vector.abs().max() > 0  # it has learned

    alpha_t, sigma_t = Cosine().at(torch.tensor([-3.0])).like(torch.zeros(512, 2))
    batch = Vectors().held_out.batch(slice(None))
    x_0, cond = batch["x_0"], batch["cond"]
    x_t = alpha_t * x_0 + sigma_t * normals(512, 2, seed=9).float()
    with torch.no_grad():
        guesses = {
            "told": run.denoiser(x_t, alpha_t, sigma_t, **cond),
            "nothing": run.denoiser(x_t, alpha_t, sigma_t, **null(cond)),
            "none": run.denoiser(x_t, alpha_t, sigma_t),
        }
        guided = CFG(run.denoiser, scale=2.5)(x_t, alpha_t, sigma_t, **cond)
    error = {name: (guess - x_0).square().mean().item() for name, guess in guesses.items()}
    assert error["told"] < 0.2
    left = (sigma_t[0] ** 2 / (alpha_t[0] ** 2 + sigma_t[0] ** 2)).item()
    assert error["nothing"] == pytest.approx(left, abs=0.12)
    torch.testing.assert_close(guesses["none"], guesses["nothing"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided, torch.lerp(guesses["nothing"], guesses["told"], 2.5), rtol=1e-4, atol=1e-4)

    for scale, low, high in ((1.0, 0, 0.25), (0.0, 1, 4)):
        overrides = ["sampler=ddim", "sampler.steps=10", f"guidance.scale={scale}", "ckpt=none"]
        drawn, _ = run.draw(run.parts_for(plain(compose("sample", overrides))), cond, range(512))
        assert low < (drawn - x_0).square().mean().item() < high


# What "no condition" is


def test_rows_of_nan_are_the_learned_null_vector():
    conditioner = perturbed(Conditioner(16, 8, num_classes=3, vector=4), 0.5)
    c_noise, label, vector = torch.tensor([-1.0, 0.0, 1.0]).double(), torch.tensor([0, 1, 2]), normals(3, 4)
    vector[1] = math.nan
    found = conditioner(c_noise, label, vector)
    filled = vector.clone()
    filled[1] = conditioner.null_vector.detach()
    assert torch.equal(found, conditioner(c_noise, label, filled))
    assert torch.equal(conditioner(c_noise, label), conditioner(c_noise, label, torch.full((3, 4), math.nan)))
    assert (found[1] - conditioner(c_noise, label, torch.zeros(3, 4).double())[1]).abs().max() > 1e-3


def test_entries_of_nan_are_learned_too():
    """A vector may be known in part."""
    conditioner = perturbed(Conditioner(16, 8, vector=4), 0.5)
    vector = normals(1, 4)
    part = vector.clone()
    part[0, 2] = math.nan
    filled = vector.clone()
    filled[0, 2] = conditioner.null_vector[2].item()
    assert torch.equal(
        conditioner(torch.zeros(1).double(), None, part), conditioner(torch.zeros(1).double(), None, filled)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_dropped_vectors_reach_the_null_vector_alone(dtype):
    """Without a NaN anywhere, whatever the precision of the network and of the vector."""
    net = perturbed(MLP((2,), 3, vector=4, width=16, depth=1), 0.3).to(dtype)
    vector = normals(4, 4).float().requires_grad_()
    given = torch.where(torch.tensor([True, False, True, False])[:, None], vector, math.nan)
    y = net(normals(4, 2).to(dtype), torch.zeros(4), torch.tensor([0, 1, -1, -1]), given)
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert (net.condition.null_vector.grad != 0).all()
    assert (vector.grad[[0, 2]] != 0).all()
    assert (vector.grad[[1, 3]] == 0).all()


def test_label_and_vector_are_dropped_together_and_an_image_never():
    torch.manual_seed(0)
    n = 20_000
    cond = {"label": torch.arange(n) % 5, "vector": normals(n, 3), "low_res": normals(n, 1, 2, 2)}
    dropped = Drop(0.2)(cond)
    gone = dropped["label"] == NULL
    assert gone.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(dropped["vector"].isnan(), gone[:, None].expand(n, 3))
    assert torch.equal(dropped["low_res"], cond["low_res"])
    kept = ~gone
    assert torch.equal(dropped["label"][kept], cond["label"][kept])
    assert torch.equal(dropped["vector"][kept], cond["vector"][kept])


def test_nothing_said_is_the_same_for_training_and_guidance():
    """What drop leaves of a dropped sample is what guidance calls null; integers stay integers."""
    cond = {"label": torch.tensor([3, 7]), "vector": torch.ones(2, 3), "low_res": torch.ones(2, 1, 4, 4)}
    nothing = null(cond)
    assert nothing["label"].tolist() == [NULL, NULL]
    assert nothing["label"].dtype == torch.int64
    assert nothing["vector"].isnan().all()
    assert nothing["low_res"] is cond["low_res"]
    denoiser = Denoiser(perturbed(MLP((2,), 8, vector=3, width=16, depth=1)), make("target", "v"))
    asked = normals(2, 2), *Cosine()(torch.tensor([[0.3], [0.8]]).double())
    del nothing["low_res"], cond["low_res"]
    with torch.no_grad():
        assert torch.equal(CFG(denoiser, scale=0)(*asked, **cond), denoiser(*asked, **nothing))
        torch.testing.assert_close(denoiser(*asked, **nothing), denoiser(*asked), rtol=1e-12, atol=1e-12)
        assert (denoiser(*asked, **nothing) - denoiser(*asked, **cond)).abs().max() > 1e-4


def test_null_forgets_labels_and_nothing_else():
    cond = {"label": torch.tensor([3, 0]), "shift": torch.ones(2, 1)}
    nothing = null(cond)
    assert nothing["label"].tolist() == [NULL, NULL]
    assert nothing["label"].dtype == torch.int64
    assert torch.equal(nothing["shift"], cond["shift"])
    assert cond["label"].tolist() == [3, 0]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_drop_forgets_each_label_with_its_probability(p):
    torch.manual_seed(0)
    label = torch.arange(50_000) % 10
    dropped = Drop(p)({"label": label})["label"]
    share = (dropped == NULL).double().mean().item()
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 50_000)
    assert torch.equal(dropped[dropped != NULL], label[dropped != NULL])
    pairs = (dropped[:-1] == NULL).double() * (dropped[1:] == NULL)
    assert abs(pairs.mean().item() - p**2) <= 0.01
    assert Drop(p)({}) == {}
    assert label.min() == 0


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan])
def test_a_bad_drop_is_refused_in_a_line(p):
    with pytest.raises(ValueError, match=rf"^p_null={p}: need [^\n]*$"):
        Drop(p)


def test_a_run_names_a_bad_drop():
    with pytest.raises(UserError, match=r"^p_null=1.5: need [^\n]*$"):
        _ = parts("p_null=1.5").drop
