"""Latents: made by the command, mapped, trained on, decoded; and what can be wrong with them."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import denoiselab
from denoiselab import encoding
from denoiselab.checks import check
from denoiselab.compose import compose
from denoiselab.data import Digits, Latents, autoencoders
from denoiselab.data.stream import MicroBatch, Stream
from denoiselab.errors import RunHeld, UserError
from denoiselab.experiment import Parts, resolve
from denoiselab.models import VQ
from exact import normals
from latents import SHAPE, autoencoder, encode


def everything(data: Latents) -> Tensor:
    return data.train.batch(slice(None))["x_0"]


def test_latents_are_what_the_encoder_gives_in_order_with_labels_and_ids(encoded, encoder):
    data, digits, net = Latents(root=str(encoded)), Digits(), autoencoders.read(encoder)
    assert data.shape == SHAPE
    assert data.num_classes == 10
    assert [path.name for path in sorted(encoded.glob("train-*"))] == [f"train-{k:05d}.safetensors" for k in range(3)]
    for split, real in ((data.train, digits.train), (data.held_out, digits.held_out)):
        assert torch.equal(split.ids, real.ids)
        assert torch.equal(split.label, real.label)
        latent = net.encode(real.x_0)[0]
        x_0 = (latent - torch.tensor(data.codec.mean).view(-1, 1, 1)) * data.codec.scale
        torch.testing.assert_close(split.batch(slice(None))["x_0"], x_0, rtol=1e-4, atol=1e-4)
    back = data.codec.decode(data.held_out.x_0)
    torch.testing.assert_close(back, net.decode(net.encode(digits.held_out.x_0)[0]).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(data.codec.encode(digits.held_out.x_0), data.held_out.x_0, rtol=1e-4, atol=1e-4)


def test_what_is_trained_on_has_mean_zero_and_variance_one(encoded):
    data = Latents(root=str(encoded))
    draws = torch.stack([data.train.__getitems__([(epoch, i) for i in range(1437)])["x_0"] for epoch in range(20)])
    assert float(draws.mean((0, 1, 3, 4)).abs().max()) < 0.005
    assert float(draws.std()) == pytest.approx(1, abs=0.003)
    assert data.codec.sigma_data == 1
    rest = draws - everything(data)
    std = torch.cat([load_file(path)["std"] for path in sorted(encoded.glob("train-*"))]) * data.codec.scale
    assert float((rest / std).mean()) == pytest.approx(0, abs=0.005)
    assert float((rest / std).std()) == pytest.approx(1, abs=0.003)


def test_a_draw_is_addressed_by_seed_epoch_and_index(encoded):
    train = Latents(root=str(encoded)).train
    alone = train.__getitems__(MicroBatch([(3, 700)], seed=5))["x_0"][0]
    among = train.__getitems__(MicroBatch([(3, 2), (3, 700), (4, 700)], seed=5))["x_0"]
    assert torch.equal(alone, among[1])
    other = train.__getitems__(MicroBatch([(3, 700)], seed=6))["x_0"][0]
    assert not torch.equal(alone, among[2])
    assert not torch.equal(alone, other)
    means = Latents(root=str(encoded), sample=False).train
    assert torch.equal(means.__getitems__([(3, 700)])["x_0"], train.batch(torch.tensor([700]))["x_0"])


def test_the_loader_stays_where_it_is_when_the_codec_follows_the_network(encoded):
    data = Latents(root=str(encoded))
    before = data.train.__getitems__([(0, 1), (0, 2)])["x_0"]
    data.codec.to("meta")
    assert torch.equal(data.train.__getitems__([(0, 1), (0, 2)])["x_0"], before)


def test_shards_do_not_show(encoded, encoder, tmp_path):
    one, three = Latents(root=str(encode(tmp_path / "one", encoder, "shard=5000"))), Latents(root=str(encoded))
    for addresses in Stream(1437, 64, seed=1):
        found = [data.train.__getitems__(addresses) for data in (one, three)]
        torch.testing.assert_close(found[0]["x_0"], found[1]["x_0"], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[0]["id"], found[1]["id"])
        assert torch.equal(found[0]["cond"]["label"], found[1]["cond"]["label"])
        break


def test_mirrored_images_are_encoded_and_drawn_by_a_hash(encoder, tmp_path, encoded):
    folder = encode(tmp_path / "both", encoder, "flip=true", "metrics=none")
    data, net, images = Latents(root=str(folder), sample=False, flip=True), autoencoders.read(encoder), Digits().train
    addresses = MicroBatch([(2, i) for i in range(200)], seed=3)
    found = data.train.__getitems__(addresses)["x_0"]
    shift, scale = torch.tensor(data.codec.mean).view(-1, 1, 1), data.codec.scale
    either = [(net.encode(x)[0] - shift) * scale for x in (images.x_0[:200], images.x_0[:200].flip(-1))]
    mirrored = (found - either[1]).abs().amax((1, 2, 3)) < 1e-3
    assert 70 < int(mirrored.sum()) < 130
    torch.testing.assert_close(found[~mirrored], either[0][~mirrored], rtol=1e-3, atol=1e-3)
    assert torch.equal(found[50:60], data.train.__getitems__(MicroBatch(addresses[50:60], seed=3))["x_0"])
    assert torch.equal(
        data.train.batch(slice(0, 200))["x_0"], Latents(root=str(folder)).train.batch(slice(0, 200))["x_0"]
    )
    whole = Latents(root=str(folder), flip=True).train
    draws = torch.stack([whole.__getitems__([(epoch, i) for i in range(1437)])["x_0"] for epoch in range(10)])
    assert float(draws.std()) == pytest.approx(1, abs=0.005)
    assert float(draws.mean((0, 1, 3, 4)).abs().max()) < 0.01
    with pytest.raises(ValueError, match=r"^flip=true: these were encoded without mirrored images"):
        Latents(root=str(encoded), flip=True)


def test_half_precision_takes_half_the_place(encoded, encoder, tmp_path):
    half = encode(tmp_path / "half", encoder, "dtype=float16", "shard=500")
    sizes = [(folder / "train-00000.safetensors").stat().st_size for folder in (half, encoded)]
    assert sizes[0] < 0.6 * sizes[1]
    found, expected = (everything(Latents(root=str(folder))) for folder in (half, encoded))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_vq_autoencoder_has_no_deviation(tmp_path):
    data = Latents(root=str(encode(tmp_path / "vq", autoencoder(tmp_path / "net", VQ))))
    assert torch.equal(data.train.__getitems__([(0, 3)])["x_0"], data.train.batch(torch.tensor([3]))["x_0"])
    assert float(everything(data).std()) == pytest.approx(1, abs=1e-3)


def test_an_interrupted_command_goes_on_and_ends_with_the_same_bytes(encoded, encoder, tmp_path, monkeypatch):
    written, write = [], encoding.write_atomic

    def dies(path, fill):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, fill)

    monkeypatch.setattr(encoding, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "again", encoder, "shard=500")
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(encoding, "write_atomic", lambda path, fill: (written.append(path.name), write(path, fill)))
    encode(tmp_path / "again", encoder, "shard=500")
    assert len(written) == len(set(written)) == 4
    files = sorted(path.relative_to(encoded) for path in encoded.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for path in files:
        if path.suffix == ".safetensors":
            assert (encoded / path).read_bytes() == (tmp_path / "again" / path).read_bytes()
    assert not (tmp_path / "again.partial").exists()


def test_it_is_made_once_and_nothing_is_overwritten(encoded, encoder, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in encoded.rglob("*")}
    assert encode(encoded, encoder, "shard=500") == encoded
    assert "already encoded" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^output=.*: holds latents of another set, encoder, dtype or flip; name"):
        encode(encoded, encoder, "dtype=float16")
    assert {path: path.stat().st_mtime_ns for path in encoded.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"^output=.*mine: exists and holds no latents"):
        encode(tmp_path / "mine", encoder)


def test_how_well_it_reconstructs_is_measured_on_held_out_images(encoded, encoder):
    data, net, real = Latents(root=str(encoded)), autoencoders.read(encoder), Digits().held_out.x_0
    mse = (net.decode(net.encode(real)[0]).clamp(-1, 1) - real).square().mean().item()
    assert data.reconstruction["mse"] == pytest.approx(mse, rel=1e-3)
    assert {"psnr", "ssim"} <= data.reconstruction.keys()


def test_a_run_goes_from_latents_to_decoded_samples(encoded, train, monkeypatch):
    run = train(f"data.root={encoded}", "experiment=latent_digits", "metrics=digits", "callbacks=none")
    file = next(run.glob("evaluations/*/evaluation.json"))
    records = {record["name"]: record for record in json.loads(file.read_text())["records"]}
    assert records["fd_digits"]["value"] > 0
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [key for key in content["state_dict"] if "codec" in key or "encoder" in key]
    monkeypatch.setattr(encoding, "read_index", None)
    loaded = denoiselab.load(run)
    samples = loaded.sample(n=3, steps=2)
    assert samples.shape == (3, 1, 8, 8)
    assert float(samples.abs().max()) <= 1
    assert not [name for name, _ in loaded.codec.named_parameters()]
    assert loaded.codec.to(torch.bfloat16).decode(normals(1, *SHAPE)).dtype == torch.float32


def test_what_is_measured_on_samples_comes_with_the_floor_of_decoding(encoder, tmp_path, train):
    folder = encode(tmp_path / "floor", encoder, "metrics=reconstruction_digits")
    run = train(f"data.root={folder}", "experiment=latent_digits", "metrics=digits", "callbacks=none")
    file = next(run.glob("evaluations/*/evaluation.json"))
    for record in json.loads(file.read_text())["records"]:
        expected = Latents(root=str(folder)).reconstruction.get(record["name"])
        assert record["controls"].get("reconstruction") == expected
        assert (expected is None) == (record["name"] == "held_out_loss")


@pytest.mark.parametrize("option", ["data=latents", "experiment=latent_digits"])
def test_an_option_composes_and_asks_for_its_folder(option, encoded):
    parts = Parts(resolve(compose("train", [option, f"data.root={encoded}"])))
    check(parts)
    assert parts.shape == SHAPE
    assert parts.images.shape == (1, 8, 8)
    with pytest.raises(UserError, match=r"^data\.root=\?\?\?: this option must be given$"):
        resolve(compose("train", [option]))


def test_a_moved_folder_is_the_same_run_and_another_encoding_is_not(encoded, copy, encoder, tmp_path):
    other = encode(tmp_path / "other", encoder, "dtype=float16")
    found = []
    for root in (encoded, copy, other):
        config = resolve(compose("train", [f"data.root={root}", "data=latents"]))
        found.append(Parts(config).data.by_content(config["data"]))
    assert found[0] == found[1] != found[2]
    assert "root" not in found[0]


def test_an_autoencoder_of_diffusers_is_asked_as_its_library_asks_it(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=3,
        norm_num_groups=4,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    folder = encode(tmp_path / "latents", tmp_path / "vae")
    data, real = Latents(root=str(folder)), Digits().held_out.x_0[:7]
    with torch.no_grad():
        posterior = vae.encode(real).latent_dist
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
    shard = load_file(folder / "held_out-00000.safetensors")
    torch.testing.assert_close(shard["mean"][:7], posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shard["std"][:7], posterior.std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(data.codec.decode(data.held_out.x_0[:7]), decoded, rtol=1e-4, atol=1e-4)
    again = encode(tmp_path / "again", folder)
    assert (again / "held_out-00000.safetensors").read_bytes() == (folder / "held_out-00000.safetensors").read_bytes()


def test_an_encoder_that_is_none_is_refused_before_anything_is_written(example_run, encoder, tmp_path):
    for source, message in (
        (example_run, "is a run that trained a denoiser; need one of loss=autoencoder"),
        (tmp_path, "neither a run or a checkpoint of an autoencoder, nor an AutoencoderKL"),
        (tmp_path / "nowhere", r"nowhere: no such run, checkpoint or folder; a name on the hub is OWNER/NAME"),
    ):
        with pytest.raises(UserError, match=message):
            encode(tmp_path / "out", source)
    for override, message in (
        ("batch=0", r"^batch=0: need a whole number >= 1$"),
        ("shard=0", r"^shard=0: need a whole number >= 1$"),
        ("dtype=int8", r"^dtype=int8: need one of float32, float16$"),
        ("data=8gaussians", r"^data: need images; this set has samples of shape \(2,\)$"),
        ("data=super_resolution", r"^data: need images alone, and these come with conditions"),
        ("device=tpu", r"^device=tpu: need one of auto, cpu, cuda"),
    ):
        with pytest.raises(UserError, match=message):
            encode(tmp_path / "out", encoder, override)
    assert not list(tmp_path.glob("out*"))


def test_images_that_do_not_fit_the_encoder_are_named_before_anything_is_written(tmp_path):
    colour = autoencoder(tmp_path / "colour", shape=(3, 8, 8))
    with pytest.raises(UserError, match=r"^encoder=.*colour: cannot take images of shape \(1, 8, 8\)"):
        encode(tmp_path / "out", colour)
    for i in range(20):
        Image.new("L", (9, 9), i).save(tmp_path / f"{i}.png")
    odd = ["data=image_folder", f"data.root={tmp_path}", "data.size=9", "data.channels=1"]
    with pytest.raises(UserError, match=r"gives images of shape \(1, 9, 9\) back as \(1, 10, 10\); choose another"):
        encode(tmp_path / "out", autoencoder(tmp_path / "grey"), *odd)
    assert not list(tmp_path.glob("out*"))


def test_a_bad_image_is_left_out_and_paths_are_kept_absolute(encoder, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "none").mkdir()
    for i in range(300):
        Image.new("L", (8, 8), i % 256).save(tmp_path / "set" / f"{i:03d}.png")
    (tmp_path / "set" / "007.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    lines = ["data=image_folder", "data.root=set", "data.size=8", "data.channels=1", "data.labels=none", "metrics=none"]
    folder = encode(tmp_path / "out", encoder, *lines, "data.on_error=skip", "data.held_out=10", "batch=1")
    data = Latents(root=str(folder))
    assert len(set(data.train.ids.tolist())) == len(data.train) >= 289
    assert 7 not in data.train.ids
    assert data.train.label is None
    assert data.source is not None
    assert data.source["root"] == str(tmp_path / "set")


def test_an_unfinished_folder_of_other_options_is_left_alone(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "write_atomic", lambda path, fill: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "out", encoder)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"out\.partial holds unfinished latents of other options; finish them"):
        encode(tmp_path / "out", encoder, "dtype=float16")
    assert (encode(tmp_path / "out", encoder) / "latents.json").is_file()


def test_two_commands_do_not_write_one_folder(encoder, tmp_path, monkeypatch):
    shards = encoding._shards

    def meanwhile(*arguments):
        monkeypatch.setattr(encoding, "_shards", shards)
        with pytest.raises(RunHeld, match=r"^output: another process is writing .*out\.partial$"):
            encode(tmp_path / "out", encoder)
        return shards(*arguments)

    monkeypatch.setattr(encoding, "_shards", meanwhile)
    folder = encode(tmp_path / "out", encoder)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("encoder", "held_out-00000.safetensors", "latents.json", "train-00000.safetensors"),
    ]


def test_other_metrics_are_measured_anew_and_nothing_is_encoded_again(copy, encoder, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")}
    encode(copy, encoder, "shard=500", "metrics=reconstruction_digits")
    assert "measured anew" in capsys.readouterr().err
    assert "fd_digits" in Latents(root=str(copy)).reconstruction
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*.safetensors")} == before


def test_the_command_prints_where_it_wrote(encoder, called, tmp_path):
    done = called("encode", f"encoder={encoder}", "output=here", "metrics=none")
    assert (done.returncode, done.stdout) == (0, "here\n")
    assert (tmp_path / "here" / "latents.json").is_file()
    wrong = called("encode", f"encoder={encoder}", "output=there", "metrics=none", "dtyp=float16")
    assert wrong.returncode == 2
    assert "dtype" in wrong.stderr
