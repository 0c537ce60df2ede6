"""Shards in WebDataset's format: the same samples as WebDataset reads, at random places and in little memory."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import images, picture, write_shards
from denoiselab.data import BadSample, ImageFolder, Shards
from denoiselab.data.shards import Tar
from denoiselab.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(root, **options) -> Tar:
    defaults = {"image": "png;jpg;npy", "label": "cls", "size": None, "channels": 3, "on_error": "error"}
    return Tar("root", str(root), **{**defaults, **options})


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    picture(values).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_samples_order_and_classes_are_webdatasets(kind, tmp_path):
    """Against WebDataset's own reader, which goes through the shards from first to last."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    write_shards(tmp_path / "s", kind=kind)
    paths, expected = sorted((tmp_path / "s").glob("*.tar")), []
    for path in paths:
        with path.open("rb") as stream:
            expected += group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    source = opened(tmp_path / "s")
    assert len(paths) == 3
    assert len(source) == len(expected) == 60
    for i in torch.randperm(60).tolist():
        image = np.asarray(Image.open(io.BytesIO(expected[i][kind])))
        assert np.array_equal(source.read(i).permute(1, 2, 0).numpy(), image)
        assert source.label[i] == int(expected[i]["cls"])
        assert source.where(i) == f"{expected[i]['__url__']}: {expected[i]['__key__']}.{kind}"


def test_names_with_braces_are_shards_in_their_order(tmp_path):
    write_shards(tmp_path / "s")
    source = opened(f"{tmp_path}/s/train-{{0000..0002}}.tar")
    assert source.paths == sorted((tmp_path / "s").glob("*.tar"))
    with pytest.raises(UserError, match=r"^data\.root=\S+: no file \S+train-0003\.tar$"):
        opened(f"{tmp_path}/s/train-{{0000..0003}}.tar")
    with pytest.raises(UserError, match=r"^data\.root=\S+: no \.tar files in it$"):
        opened(tmp_path)


@pytest.mark.parametrize(("label", "expected"), [("json:class", 4), ("json:odd", 2), (None, 0)])
def test_a_class_may_stand_in_a_json_file_as_a_number_or_a_name(label, expected, tmp_path):
    write_shards(tmp_path / "s")
    source = opened(tmp_path / "s", label=label)
    assert len(source.classes) == expected
    assert source.label is None if label is None else source.label.tolist() == [i % expected for i in range(60)]


def test_what_a_tar_file_may_hold(tmp_path):
    """Long names, folders, links, files of no sample, several images of one, upper case, an empty shard."""
    made = images(4)
    long = "x" * 120
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "__index__/0.png", b"not a sample")
        add(tar, "README", b"no suffix, no sample")
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, f"{long}.seg.png", b"")
        add(tar, f"{long}.CLS", b" 1\n")
        add(tar, f"{long}.PNG", png(made[0]))
        link = tarfile.TarInfo(f"{long}.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
        tar.addfile(link)
        for i in (1, 2):
            buffer = io.BytesIO()
            np.save(buffer, made[i])
            add(tar, f"folder/{i}.npy", buffer.getvalue())
            add(tar, f"folder/{i}.cls", b"0")
            add(tar, f"folder/{i}.png", png(made[3]) if i == 2 else b"")
    with tarfile.open(tmp_path / "b.tar", "w"):
        pass
    source = opened(tmp_path, image="npy;png")
    assert len(source) == 3
    assert source.label.tolist() == [1, 0, 0]
    for i in range(3):
        assert np.array_equal(source.read(i).permute(1, 2, 0).numpy(), made[i])
    assert np.array_equal(opened(tmp_path, image="png;npy").read(2).permute(1, 2, 0).numpy(), made[3])


def test_a_cut_at_any_place_is_noticed_and_only_whole_samples_are_kept(tmp_path, capfd):
    made, folder = images(6, 4), tmp_path / "s"
    write_shards(folder, made, each=6)
    (shard,) = folder.glob("*.tar")
    content = shard.read_bytes()
    end = content.rstrip(bytes(1)).__len__()
    end += -end % 512  # the mark of the end begins here
    with tarfile.open(shard) as tar:
        first = tar.getmembers()[3].offset_data  # from here on, the second sample's first header is whole
    kept = []
    for cut in [*range(0, end + 1, 128), end + 511]:
        shard.write_bytes(content[:cut])
        with pytest.raises(BadSample, match=rf"^{shard} \(index \d\): truncated") as refusal:
            opened(folder)
        assert "\n" not in str(refusal.value)
        if cut < first:
            with pytest.raises(UserError, match=rf"^data\.root={folder}: no samples in 1 shards$"):
                opened(folder, on_error="skip")
            continue
        source = opened(folder, on_error="skip")
        assert f"warning: {shard} (index {len(source)}): truncated" in capfd.readouterr().err
        for i in range(len(source)):
            assert np.array_equal(source.read(i).permute(1, 2, 0).numpy(), made[i])
            assert source.label[i] == i
        kept.append(len(source))
    assert kept == sorted(kept)
    assert set(kept) == {1, 2, 3, 4, 5}
    shard.write_bytes(content[: end + 512])
    assert len(opened(folder)) == 6


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_file_is_refused(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(BadSample, match=r"a\.tar \(index 0\): truncated"):
        opened(tmp_path)


def test_a_shard_is_gone_through_once_and_again_when_it_changes(tmp_path, monkeypatch):
    from denoiselab.data import tar_index

    scanned = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path, *a: (scanned.append(path.name), scan(path, *a))[1])
    write_shards(tmp_path / "s")
    first = opened(tmp_path / "s")
    again = opened(tmp_path / "s")
    assert scanned == [f"train-000{i}.tar" for i in range(3)]
    assert first.fingerprint == again.fingerprint
    before = first.read(40)
    assert torch.equal(again.read(40), before)
    write_shards(tmp_path / "s", images(seed=1))
    changed = opened(tmp_path / "s")
    assert len(scanned) == 6
    assert not torch.equal(changed.read(40), before)
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(opened(tmp_path / "s").read(40), changed.read(40))


def test_a_shard_cut_while_it_is_read_is_noticed(tmp_path):
    write_shards(tmp_path / "s", each=60)
    source = opened(tmp_path / "s")
    source.read(0)
    (shard,) = (tmp_path / "s").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[: int(source.offset[30]) + 10])
    with pytest.raises(ValueError, match=r"^truncated: 10 of \d+ bytes$"):
        source.read(30)


def test_few_files_stay_open(tmp_path, monkeypatch):
    from denoiselab.data import shards

    monkeypatch.setattr(shards, "OPEN", 2)
    write_shards(tmp_path / "s", each=5)
    source = opened(tmp_path / "s")
    for i in torch.randperm(60).tolist():
        source.read(i)
        assert len(source._open) <= 2


def test_shards_and_a_folder_of_the_same_images_are_the_same_data(tmp_path):
    made = write_shards(tmp_path / "s")
    (tmp_path / "f").mkdir()
    for i, values in enumerate(made):
        picture(values).save(tmp_path / "f" / f"{i:03d}.png")
    shards, folder = Shards(str(tmp_path / "s"), label=None), ImageFolder(str(tmp_path / "f"))
    assert torch.equal(shards.train.batch(slice(None))["x_0"], folder.train.batch(slice(None))["x_0"])
    assert torch.equal(shards.held_out.x_0, folder.held_out.x_0)
    assert shards.codec.sigma_data == folder.codec.sigma_data


LIMITED = """
import resource, sys, torch
from denoiselab.data import Shards
from denoiselab.data.stream import Stream
torch.set_num_threads(1)

def used(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

data = Shards(sys.argv[1], batch_size=16, label=None, held_out=10)
batches = iter(Stream(len(data.train), 16, seed=0))
for _ in range(5):
    data.train.__getitems__(next(batches))
resource.setrlimit(resource.RLIMIT_DATA, (used("VmData") + 64_000_000,) * 2)
before, read = used("RssAnon"), 0
for _ in range(-(-len(data.train) // 16)):
    read += data.train.__getitems__(next(batches))["x_0"].numel()
print(read, used("RssAnon") - before, flush=True)
try:
    data.train.draw(len(data.train))
except (MemoryError, RuntimeError) as error:
    print("out of memory" if "allocate" in str(error) or isinstance(error, MemoryError) else repr(error))
"""


def test_a_set_larger_than_memory_streams_in_constant_memory(tmp_path):
    """79 MB of bytes, thus 315 MB of x_0, in a process that may take 64 MB more; one epoch in random order. The same
    process cannot hold the set."""
    import webdataset

    made = images(16, 256)
    with webdataset.ShardWriter(str(tmp_path / "s-%04d.tar"), maxcount=100, verbose=0) as sink:
        for i in range(400):
            sink.write({"__key__": f"{i:06d}", "npy": made[i % 16]})
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    streamed, held = found.stdout.splitlines()
    values, growth = map(int, streamed.split())
    assert values >= 390 * 3 * 256 * 256
    assert growth < 32_000_000
    assert held == "out of memory", found.stderr
