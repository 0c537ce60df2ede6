"""Bad input: one line that names the file and the index, or another sample in its place, in every loader process."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from torch.utils.data._utils import signal_handling

import denoiselab.data.images as split
from data_files import images, picture, write_folder, write_labels
from denoiselab.data import BadSample, ImageFolder, OnDisk, Source, Stream
from denoiselab.data.loader import Loader, LoaderDied
from denoiselab.data.source import Unreadable
from denoiselab.errors import UserError
from runs import SMALL, STEPS, last
from traps import At, Signal
from warm import Warm

SIDE = 8


def png(values: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    picture(values).save(file, kind)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 16 billion pixels."""
    head = struct.pack(">IIBBBBB", 125_000, 125_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


GOOD = images(1, SIDE)[0]
FLOATS = GOOD.astype(np.float32) / 127.5 - 1
NOISE = images(1, 64)[0]


def changed(values: np.ndarray, value: float) -> np.ndarray:
    values = values.copy()
    values[3, 3, 1] = value
    return values


PICTURES = {
    "cut png": (png(NOISE)[:300], "truncated"),
    "cut jpeg": (png(NOISE, "jpeg")[:700], "truncated"),
    "flipped bytes": (png(NOISE)[:200] + bytes(64) + png(NOISE)[264:], ""),
    "zero bytes": (b"", "an empty file"),
    "no image": (b"<html>not found</html>", "not an image that Pillow can read"),
    "bomb": (bomb(), "pixels"),
    "other size": (png(images(1, SIDE + 1)[0]), "is 3 x 9 x 9 x uint8, the first is 3 x 8 x 8 x uint8"),
    "32 bits": (None, "mode F: need 8 or 16 bits per channel"),
}
ARRAYS = {
    "NaN": (npy(changed(FLOATS, float("nan"))), "has values from nan to nan, need numbers in [-1, 1]"),
    "infinity": (npy(changed(FLOATS, float("inf"))), "to inf, need numbers in [-1, 1]"),
    "out of range": (npy(changed(FLOATS, 255)), "to 255, need numbers in [-1, 1]"),
    "just below": (npy(changed(FLOATS, -1.01)), "has values from -1.01 to "),
    "bytes among floats": (npy(GOOD), "is 3 x 8 x 8 x uint8, the first is 3 x 8 x 8 x float32"),
    "integers": (npy(GOOD.astype(np.int64)), "an array (8, 8, 3) of int64; need (H, W, C) of uint8"),
    "four axes": (npy(FLOATS[None]), "an array (1, 8, 8, 3) of float32; need (H, W, C)"),
    "other shape": (npy(FLOATS[:, :7]), "is 3 x 8 x 7 x float32, the first is 3 x 8 x 8 x float32"),
    "grey": (npy(FLOATS[..., 0]), "is 1 x 8 x 8 x float32, the first is 3 x 8 x 8 x float32"),
    "a pickle": (npy(np.array([{}], dtype=object)), "allow_pickle"),
    "cut array": (npy(FLOATS)[:300], ""),
    "empty array": (b"", "an empty file"),
}
CASES = [("png", name) for name in PICTURES] + [("npy", name) for name in ARRAYS]
BAD = 47  # past the first image, which says how the others should be


def write(folder, suffix: str, n: int = 60) -> None:
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:03d}.{suffix}").write_bytes(png(GOOD) if suffix == "png" else npy(FLOATS))


def read_all(folder) -> int:
    """What a set reads before it trains: the images that sigma_data is measured on, here all, and the held-out ones."""
    return len(ImageFolder(str(folder), labels="none").held_out)


def write_bad(folder, suffix: str, case: str) -> str:
    """A folder of 60 good files but one; what must be said of it."""
    write(folder, suffix)
    content, reason = (PICTURES if suffix == "png" else ARRAYS)[case]
    file = folder / f"{BAD:03d}.{suffix}"
    if content is None:
        from PIL import Image

        Image.fromarray(np.zeros((8, 8), np.float32)).save(file, "tiff")
    else:
        file.write_bytes(content)
    return reason


@pytest.mark.faults
@pytest.mark.parametrize(("suffix", "case"), CASES)
def test_a_bad_sample_is_named_with_its_file_index_and_reason(suffix, case, tmp_path, faults):
    reason = write_bad(tmp_path / "f", suffix, case)
    with pytest.raises(BadSample) as refusal:
        read_all(tmp_path / "f")
    line = str(refusal.value)
    assert line.startswith(f"{tmp_path}/f/{BAD:03d}.{suffix} (index {BAD}): ")
    assert reason in line
    assert "\n" not in line
    assert refusal.value.status == 2
    faults.injected("call")


@pytest.mark.faults
@pytest.mark.parametrize(("suffix", "case"), CASES[::9])
def test_a_loader_process_says_the_same(suffix, case, tmp_path, monkeypatch, faults):
    """The error arrives as one line of the same class, without the traceback that PyTorch wraps it in."""
    monkeypatch.setattr(split, "MEASURED", 1)
    monkeypatch.setattr(split, "some", lambda total, n: torch.zeros(1, dtype=torch.long))
    write_bad(tmp_path / "f", suffix, case)
    data = ImageFolder(str(tmp_path / "f"), labels="none", held_out=1)
    loader = Loader(data.train, batch_sampler=Stream(len(data.train), 16, seed=0), collate_fn=same, num_workers=1)
    with pytest.raises(BadSample) as refusal:
        for _ in zip(range(8), loader, strict=False):
            pass
    assert str(refusal.value).startswith(f"{tmp_path}/f/{BAD:03d}.{suffix} (index {BAD}): ")
    assert "\n" not in str(refusal.value)
    assert "Traceback" not in str(refusal.value)
    faults.injected("call")


def same(batch):
    return batch


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_missing_label_is_named_at_once(kind, tmp_path, faults):
    folder, file = tmp_path / "f", tmp_path / f"labels.{kind}"
    write(folder, "png")
    write_labels(file, {f"{i:03d}.png": i % 3 for i in range(60) if i != BAD})
    with pytest.raises(BadSample, match=rf"^{folder}/{BAD:03d}\.png \(index {BAD}\): has no label$"):
        ImageFolder(str(folder), labels=str(file))
    write_labels(file, {f"{i:03d}.png": "" if i == BAD else i % 3 for i in range(60)})
    with pytest.raises(BadSample, match=rf"\(index {BAD}\): has no label$"):
        ImageFolder(str(folder), labels=str(file))
    faults.injected("call", 2)


def test_an_image_beside_the_class_folders_has_no_label(tmp_path):
    write_folder(tmp_path)
    picture(GOOD).save(tmp_path / "stray.png")
    with pytest.raises(BadSample, match=r"/stray\.png \(index 60\): has no label$"):
        ImageFolder(str(tmp_path))


class Listed(Source):
    """200 images whose byte is their index; some are bad, by their index."""

    classes, fingerprint = [], ""

    def __init__(self, bad: set[int], label: torch.Tensor | None = None, n: int = 200):
        self.bad, self.label, self.n = bad, label, n

    def __len__(self) -> int:
        return self.n

    def where(self, index: int) -> str:
        return f"file{index}"

    def read(self, index: int) -> torch.Tensor:
        if index in self.bad:
            raise ValueError("spoilt")
        return torch.full((1, 2, 2), index % 256, dtype=torch.uint8)


def on_disk(source: Source, on_error: str = "skip") -> OnDisk:
    return OnDisk(source, torch.arange(len(source)), (1, 2, 2), torch.uint8, on_error=on_error)


def seen(samples: OnDisk, workers: int, start: int = 0, count: int = 40) -> list[list[int]]:
    """What the stream shows from a step on: ids, which must be those of the images."""
    stream = Stream(len(samples), 16, seed=3, start=start)
    batches = iter(Loader(samples, batch_sampler=stream, collate_fn=same, num_workers=workers))
    found = []
    for _ in range(count):
        batch = next(batches)
        assert torch.equal(((batch["x_0"][:, 0, 0, 0] + 1) * 127.5).round().long(), batch["id"] % 256)
        found.append(batch["id"].tolist())
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_sample_is_replaced_by_the_same_one_whenever_and_wherever_it_is_met(workers, capfd):
    bad = {17, 141}
    clean, whole = seen(on_disk(Listed(set())), 0), seen(on_disk(Listed(bad)), 0)
    assert seen(on_disk(Listed(bad)), workers) == whole
    assert seen(on_disk(Listed(bad)), workers, start=17, count=23) == whole[17:]
    places = {(s, i) for s in range(40) for i in range(16) if clean[s][i] in bad}
    assert {(s, i) for s in range(40) for i in range(16) if clean[s][i] != whole[s][i]} == places
    instead = {bad_one: {whole[s][i] for s, i in places if clean[s][i] == bad_one} for bad_one in bad}
    assert all(len(replacement) == 1 for replacement in instead.values())
    assert not bad & set().union(*instead.values())
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: file17 ")]
    assert "warning: file17 (index 17): spoilt; another is taken in its place (" in lines[0]


def test_what_was_skipped_is_counted_and_listed_across_processes():
    samples = on_disk(Listed({17, 141}))
    seen(samples, 2)
    assert samples.skipped == [{"index": 17, "where": "file17"}, {"index": 141, "where": "file141"}]
    assert on_disk(Listed(set())).skipped == []


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_in_a_hundred_stops_the_run(workers, faults):
    """Two of 200 are one percent; the third is too many, whichever process meets it."""
    seen(on_disk(Listed({3, 50})), workers)
    with pytest.raises(BadSample, match=r"^file\d+ \(index \d+\): spoilt; 3 of 200 are bad, more than the 1 %"):
        seen(on_disk(Listed({3, 50, 150})), workers)
    faults.injected("call")


@pytest.mark.faults
def test_a_replacement_may_be_bad_itself(faults):
    samples = on_disk(Listed({3}, n=1000))
    (instead,) = samples.batch(torch.tensor([3]))["id"].tolist()
    (other,) = on_disk(Listed({3, instead}, n=1000)).batch(torch.tensor([3]))["id"].tolist()
    assert len({3, instead, other}) == 3
    faults.injected("call", 2)


def test_a_sample_without_a_label_is_skipped_with_its_label():
    label = torch.arange(200) % 7
    label[20] = -1
    batch = on_disk(Listed(set(), label)).batch(torch.tensor([19, 20, 21]))
    assert batch["id"][1] != 20
    assert torch.equal(batch["cond"]["label"], label[batch["id"]])
    assert (batch["cond"]["label"] >= 0).all()


@pytest.mark.faults
def test_held_out_images_are_dropped_and_not_padded(tmp_path, faults):
    write(tmp_path / "f", "png", 300)
    first = ImageFolder(str(tmp_path / "f"), labels="none")
    ids = first.held_out.ids.tolist()
    (tmp_path / "f" / f"{ids[4]:03d}.png").write_bytes(b"")
    data = ImageFolder(str(tmp_path / "f"), labels="none", on_error="skip")
    assert data.held_out.ids.tolist() == [i for i in ids if i != ids[4]]
    assert torch.equal(data.train.ids, first.train.ids)
    faults.injected("call")


@pytest.mark.faults
@pytest.mark.parametrize(("error", "kind"), [(OSError(5, "no answer"), Unreadable), (MemoryError(), MemoryError)])
def test_a_failing_disk_is_no_bad_sample(error, kind, faults):
    """What is wrong with the machine is never skipped."""

    class Failing(Listed):
        def read(self, index):
            raise error

    with pytest.raises(kind) as refusal:
        on_disk(Failing(set())).batch(torch.tensor([1]))
    assert not isinstance(refusal.value, BadSample)
    faults.injected("call")


def test_all_of_train_is_refused_in_a_line(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(UserError, match=r"^data: this set is read from files image by image"):
        _ = ImageFolder(str(tmp_path)).train.x_0


def test_an_error_of_a_loader_process_that_lives_arrives_as_it_is():
    class Broken(Listed):
        def where(self, index):
            raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake in the code"):
        seen(on_disk(Broken({5})), 2)


class Deadly(Listed):
    def read(self, index):
        if index == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


class DeadlyWithLock(Listed):
    """Is killed while it asks whether it is to end, which every process does under one lock."""

    def read(self, index):
        if index == 100:
            frame = sys._getframe()
            while "done_event" not in frame.f_locals:
                frame = frame.f_back
                assert frame
            frame.f_locals["done_event"]._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def until_it_dies(loader: Loader) -> None:
    """The signal may come while a batch is looked at."""
    try:
        for _ in loader:
            pass
    except RuntimeError as error:
        raise loader.met_elsewhere(error) or error from None


@pytest.mark.faults
@pytest.mark.parametrize("handled", [True, False])
@pytest.mark.parametrize("samples", [Deadly, DeadlyWithLock])
def test_a_killed_loader_process_ends_the_run_at_once(samples, handled: bool, faults, monkeypatch):
    """Whether PyTorch is told by a signal, or finds out when it looks. It sets its handler once in a process, and
    Lightning takes it away when a run ends."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", not handled)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    source = on_disk(samples(set()))
    loader = Loader(source, batch_sampler=Stream(len(source), 16, seed=3), collate_fn=same, num_workers=2)
    before = time.perf_counter()
    with pytest.raises(LoaderDied, match=r"^data: loader process \d+, one of 2, was killed by SIGKILL; memory may"):
        until_it_dies(loader)
    loader.end()
    assert LoaderDied.status == 1
    assert time.perf_counter() - before < 10
    faults.injected("call")


@pytest.mark.faults
def test_a_loader_process_that_is_killed_while_something_else_is_done_is_named_too(faults, monkeypatch):
    """PyTorch's signal handler raises wherever the main thread is."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    samples = on_disk(Listed(set()))
    loader = Loader(samples, batch_sampler=Stream(len(samples), 16, seed=0), collate_fn=same, num_workers=2)
    next(iter(loader))
    victim, other = loader.batches._workers
    threading.Timer(0.2, os.kill, (victim.pid, signal.SIGKILL)).start()
    with pytest.raises(RuntimeError, match=r"^DataLoader worker") as error:
        time.sleep(10)
    said = str(loader.met_elsewhere(error.value))
    assert said.startswith(f"data: loader process {victim.pid}, one of 2, was killed by SIGKILL")
    assert loader.met_elsewhere(RuntimeError("of something else")) is None
    loader.end()
    assert not other.is_alive()
    faults.injected("call")


def test_a_run_ends_with_the_line_of_a_bad_sample_that_a_loader_process_met(train, tmp_path, monkeypatch):
    """Through Lightning, with its teardown, and into status.json."""
    monkeypatch.setattr(split, "some", lambda total, n: torch.zeros(1, dtype=torch.long))
    write_bad(tmp_path / "f", "png", "zero bytes")
    small = ["model.channels=32", "callbacks=none", "trainer.max_steps=20", "guidance=none", "data.held_out=1"]
    options = ["data=image_folder", f"data.root={tmp_path / 'f'}", "data.labels=none", "data.size=8", "data.workers=1"]
    with pytest.raises(BadSample, match=rf"^\S+/{BAD:03d}\.png \(index {BAD}\): an empty file$"):
        train(*options, *small, "data.batch_size=8")
    (status,) = (tmp_path / "outputs").rglob("status.json")
    assert json.loads(status.read_text())["state"] == "failed"


def test_what_a_run_skipped_is_listed_beside_it(train, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("denoiselab.data.source.BAD_SHARE", 0.1)
    write_bad(tmp_path / "f", "png", "zero bytes")
    options = ["data=image_folder", f"data.root={tmp_path / 'f'}", "data.labels=none", "data.size=8", "data.workers=1"]
    small = ["model.channels=32", "callbacks=none", "trainer.max_steps=8", "guidance=none", "data.on_error=skip"]
    run = train(*options, *small, "data.batch_size=8")
    (row,) = (run / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(row) == {"index": BAD, "where": f"{tmp_path}/f/{BAD:03d}.png"}
    assert f"1 bad samples were passed over: {run}/bad_samples.jsonl" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.faults
def test_what_is_skipped_is_the_same_in_a_run_that_is_killed(tmp_path, faults):
    root = tmp_path / "f"
    root.mkdir()
    for i, values in enumerate(images(120, SIDE)):
        (root / f"{i:03d}.png").write_bytes(b"" if i == BAD else png(values))
    options = ["data=image_folder", f"data.root={root}", "data.labels=none", "data.size=8", "data.on_error=skip"]
    options += [*SMALL, *STEPS, "guidance=none", "data.workers=1"]
    whole = Warm(tmp_path / "whole", "train", *options)
    kill = At("denoiselab.module:Diffusion.on_train_batch_start", 7, (Signal(signal.SIGKILL),))
    assert Warm(tmp_path / "parts", "train", *options, traps=[kill]).wait() == -signal.SIGKILL
    parts = Warm(tmp_path / "parts", "train", *options)
    assert (whole.wait(), parts.wait()) == (0, 0), parts.said
    runs = [next(path.parent for path in (tmp_path / name).rglob("checkpoints")) for name in ("whole", "parts")]
    faults.same(*(last(run) for run in runs))
    assert json.loads((runs[0] / "bad_samples.jsonl").read_text())["index"] == BAD
    faults.injected("process")
