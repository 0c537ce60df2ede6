"""What a run is shown is a function of (seed, samples seen): across kills, loader processes, ranks and epochs' ends."""

from __future__ import annotations

import hashlib
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from data_files import images, picture, write_folder, write_huggingface, write_shards
from denoiselab.data import Data, HuggingFace, ImageFolder, Pixels, Shards, Stream
from denoiselab.data.stream import POOL
from denoiselab.module import Feed
from runs import differences, last

STEPS, BATCH = 40, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """50 images in three sets of files, and one that is no image."""
    root = tmp_path_factory.mktemp("sets")
    made = images(50, 4)
    write_folder(root / "folder", made)
    (root / "folder" / "class_0" / "part_0" / "bad.png").write_bytes(b"")
    write_huggingface(root / "huggingface", made)
    write_shards(root / "shards", made, each=20)
    return root


def make(name: str, folder, **options) -> Data:
    shared = {"batch_size": BATCH, "flip": True, **options}
    if name == "folder":
        return ImageFolder(str(folder / name), on_error="skip", **shared)
    return {"huggingface": HuggingFace, "shards": Shards}[name](str(folder / name), **shared)


def shown(
    data: Data, start: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1, seed: int = 5
) -> list[list[str]]:
    """Per optimizer step from ``start`` to 40, what this rank is shown: id, class and every bit of each image."""
    feed = Feed(data, seed, start)
    feed.trainer = SimpleNamespace(global_rank=rank, world_size=world, accumulate_grad_batches=accumulate)  # type: ignore
    found: list[list[str]] = []
    for k, batch in enumerate(islice(iter(feed.train_dataloader()), (STEPS - start) * accumulate)):
        rows = zip(batch["id"].tolist(), batch["cond"]["label"].tolist(), batch["x_0"], strict=True)
        part = [f"{i} {label} {hashlib.sha256(x.numpy().tobytes()).hexdigest()[:8]}" for i, label, x in rows]
        if k % accumulate:
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.fixture(scope="module", autouse=True)
def _one_bad_file_of_fifty_is_allowed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("denoiselab.data.source.BAD_SHARE", 0.1)
        yield


@pytest.fixture(scope="module")
def whole(folder):
    """The 40 steps of one process that loads for itself, by the name of the set."""
    return {name: shown(make(name, folder, workers=0)) for name in ("folder", "huggingface", "shards")}


@pytest.mark.parametrize("name", ["folder", "huggingface", "shards"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_killed_run_is_shown_what_it_would_have_been(name, workers, folder, whole):
    """Killed at step 17 of 40, in another epoch than it began in; with flips, and in one set with a bad file."""
    assert shown(make(name, folder, workers=workers), start=17) == whole[name][17:]


@pytest.mark.parametrize(("workers", "world", "accumulate"), [(0, 2, 1), (2, 2, 1), (0, 1, 3), (0, 2, 3)])
def test_ranks_and_accumulation_only_slice_it(workers, world, accumulate, folder, whole):
    ranks = [shown(make("shards", folder, workers=workers), 17, rank, world, accumulate) for rank in range(world)]
    size = BATCH // (world * accumulate)
    for step in range(STEPS - 17):
        parts = [
            ranks[rank][step][micro * size : (micro + 1) * size] for micro in range(accumulate) for rank in range(world)
        ]
        assert [row for part in parts for row in part] == whole["shards"][17 + step]


def test_the_same_images_are_shown_whatever_files_they_lie_in(folder, whole):
    assert whole["shards"] == whole["huggingface"]


def test_another_seed_is_another_order(folder, whole):
    assert shown(make("shards", folder), seed=6) != whole["shards"]


def test_nothing_drawn_elsewhere_matters(folder, whole):
    torch.manual_seed(3)
    torch.rand(7)
    assert shown(make("shards", folder), 30) == whole["shards"][30:]


def test_a_block_of_the_data_reaches_the_order(folder):
    data = make("shards", folder, block=7)
    first = [row.split()[0] for row in shown(data, 0)[0]]
    expected = Stream(len(data.train), BATCH, seed=5, block=7).addresses(0, BATCH)
    assert first == [str(int(data.train.ids[index])) for _, index in expected]


def flipped(seed: int, epochs: int, n: int = 60) -> torch.Tensor:
    """(epochs, n): which images a flipping set mirrors, all epochs of the stream."""
    made = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1) + torch.tensor([0, 100], dtype=torch.uint8)
    samples = Pixels(made, None, torch.arange(n), flip=True)
    found = torch.zeros(epochs, n, dtype=torch.bool)
    for addresses in islice(Stream(n, n, seed), epochs):
        batch = samples.__getitems__(addresses)
        found[addresses[0][0], batch["id"]] = batch["x_0"][:, 0, 0, 0] > batch["x_0"][:, 0, 0, 1]
    return found


def test_half_of_all_images_are_mirrored_anew_in_every_epoch_and_for_every_seed():
    first, again, other = flipped(0, 50), flipped(0, 50), flipped(1, 50)
    assert torch.equal(first, again)
    assert first.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 3000**0.5)
    for a, b in ((first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2900**0.5)


def test_a_mirrored_image_is_its_mirror_image_and_held_out_ones_never_are(folder):
    plain, data = make("shards", folder, flip=False), make("shards", folder)
    addresses = next(iter(Stream(len(data.train), 40, seed=1)))
    still, moved = (part.train.__getitems__(addresses)["x_0"] for part in (plain, data))
    mirrored = (still != moved).flatten(1).any(1)
    assert 5 < mirrored.sum() < 35
    assert torch.equal(moved[mirrored], still[mirrored].flip(-1))
    assert torch.equal(moved[~mirrored], still[~mirrored])
    assert torch.equal(data.held_out.x_0, plain.held_out.x_0)
    index = torch.tensor([index for _, index in addresses])
    assert torch.equal(data.train.batch(index)["x_0"], still)


@pytest.mark.parametrize(("n", "block"), [(1000, 10), (997, 10), (50, 7), (40, 100)])
def test_blocks_keep_neighbours_together_and_visit_each_sample_once(n, block):
    stream = Stream(n, 1, seed=0, block=block)
    for epoch in range(3):
        order = stream.order(epoch)
        assert sorted(order.tolist()) == [*range(n)]
        place = order.argsort()
        spans = [part.max() - part.min() for part in place.split(block)]
        assert max(spans) < POOL * block  # all of a block within one pool
    assert not torch.equal(stream.order(0), stream.order(1))


def test_within_a_pool_samples_are_shuffled_and_blocks_are_drawn_at_random():
    order = Stream(3200, 1, seed=0, block=10).order(0)
    pool = order[: POOL * 10]
    assert ((pool[1:] // 10) == (pool[:-1] // 10)).float().mean() < 0.2
    assert (pool // 10).unique().diff().float().mean() > 10
    assert (pool.float().mean() - 1600).abs() < 900


def test_a_block_shuffled_stream_continues_where_it_stopped():
    whole = [*islice(Stream(50, 12, seed=0, block=5), 20)]
    assert [*islice(Stream(50, 12, seed=0, block=5, start=7), 13)] == whole[7:]
    parts = [[*islice(Stream(50, 12, seed=0, rank=rank, world=2, block=5), 20)] for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_a_run_on_files_interrupted_and_continued_has_the_weights_of_one_left_alone(train, tmp_path):
    """Twelve images per epoch: three and a half epochs, with flips and two loader processes; the weights and EMA."""
    for i, values in enumerate(images(14, 8)):
        (tmp_path / "f").mkdir(exist_ok=True)
        picture(values).save(tmp_path / "f" / f"{i}.png")
    data = ["data=image_folder", f"data.root={tmp_path / 'f'}", "data.labels=none", "data.size=8", "data.flip=true"]
    small = ["data.batch_size=6", "guidance=none", "callbacks=none", "model.channels=32", "trainer.checkpoint_every=1"]
    whole = train(*data, *small, "data.workers=0", "trainer.max_steps=7", "name=whole")
    for steps in (3, 7):
        parts = train(*data, *small, "data.workers=2", f"trainer.max_steps={steps}", "name=parts")
    assert differences(last(whole), last(parts)) == []


def test_a_run_on_a_moved_folder_is_the_same_run_and_on_a_changed_one_another(tmp_path):
    from denoiselab.compose import compose
    from denoiselab.training import Job

    def folder_of_a_run(root):
        options = ["data=image_folder", f"data.root={root}", "data.size=8", "model.channels=32", "metrics=none"]
        return Job(compose("train", [*options, f"output_dir={tmp_path}/outputs", "data.batch_size=6"])).folder.path

    write_folder(tmp_path / "a", images(20))
    first = folder_of_a_run(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert folder_of_a_run(tmp_path / "b") == first
    next((tmp_path / "b").rglob("*.png")).unlink()
    assert folder_of_a_run(tmp_path / "b") != first
