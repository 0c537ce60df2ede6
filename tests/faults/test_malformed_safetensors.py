"""Files of tensors that are not what their header says, or have no sound header, wherever such a file is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from denoiselab.compose import compose
from denoiselab.training import Job
from runs import POINTS

pytestmark = pytest.mark.faults

Header = dict[str, Any]


def packed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def with_header(change: Callable[[Header, str], None]) -> Callable[[bytes], bytes]:
    """The file with another header; ``change(header, name of its last tensor)``."""

    def changed(whole: bytes) -> bytes:
        header, data = apart(whole)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        change(header, max(tensors, key=lambda name: tensors[name]["data_offsets"]))
        return packed(json.dumps(header).encode(), data)

    return changed


def apart(whole: bytes) -> tuple[Header, bytes]:
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def moved(header: Header, name: str, by: tuple[int, int]) -> None:
    header[name]["data_offsets"] = [at + step for at, step in zip(header[name]["data_offsets"], by, strict=True)]


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "shorter than a length": lambda whole: whole[:5],
    "header beyond the end": lambda whole: (2 * len(whole)).to_bytes(8, "little") + whole[8:],
    "header of 2^63 bytes": lambda whole: (1 << 63).to_bytes(8, "little") + whole[8:],
    "header of no JSON": lambda whole: packed(b"{" * 100, apart(whole)[1]),
    "header of no UTF-8": lambda whole: packed(b'{"\xff\xfe": 1}', apart(whole)[1]),
    "header is a list": lambda whole: packed(b"[1, 2]", apart(whole)[1]),
    "header of nested lists": lambda whole: packed(b"[" * 100_000 + b"]" * 100_000, apart(whole)[1]),
    "tensors overlap": with_header(lambda header, name: moved(header, name, (-4, -4))),
    "a hole between tensors": with_header(lambda header, name: moved(header, name, (4, 4))),
    "offsets beyond the end": with_header(lambda header, name: moved(header, name, (0, 1 << 40))),
    "offsets the wrong way round": with_header(lambda header, name: header[name]["data_offsets"].reverse()),
    "negative offsets": with_header(lambda header, name: moved(header, name, (-(1 << 40), 0))),
    "shape of more than there is": with_header(lambda header, name: header[name]["shape"].append(1000)),
    "shape that overflows": with_header(lambda header, name: header[name].update(shape=[1 << 40, 1 << 40])),
    "unknown dtype": with_header(lambda header, name: header[name].update(dtype="O8")),
    "bytes after the last tensor": lambda whole: whole + b"PK\x03\x04",
    "data cut off": lambda whole: whole[:-3],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from denoiselab.cli import run

    folder = tmp_path_factory.mktemp("exported")
    job = Job(compose("train", [*POINTS, f"output_dir={folder / 'outputs'}"]))
    job.run()
    assert run(["export", f"ckpt={job.path}", "format=safetensors", f"output={folder / 'net'}"]) == 0
    return folder / "net"


def readers(exported: Path, encoder: Path, encoded: Path) -> dict[str, tuple[Path, str, tuple[str, ...]]]:
    """A folder, its file of tensors, and the command that reads it."""
    few = ("n=1", "sampler.steps=1", "device=cpu")
    return {
        "sample": (exported, "model.safetensors", ("sample", "ckpt=there", *few)),
        "import": (exported, "model.safetensors", ("import", "source=there", "output_dir=runs")),
        "encode": (
            encoder,
            "autoencoder.safetensors",
            ("encode", "data=digits", "data.size=32", "encoder=there", "output=out"),
        ),
        "train": (
            encoded,
            "train-00000.safetensors",
            ("train", "debug=quick", "experiment=latent_digits", "data.root=there", "output_dir=runs", "metrics=none"),
        ),
    }


@pytest.mark.parametrize("reader", ["sample", "import", "encode", "train"])
def test_each_is_refused_in_a_line(reader: str, exported, encoder, encoded, called, tmp_path: Path, faults):
    source, name, arguments = readers(exported, encoder, encoded)[reader]
    shutil.copytree(source, tmp_path / "there")
    file = tmp_path / "there" / name
    whole, found = file.read_bytes(), {}
    for what, change in MALFORMED.items():
        file.write_bytes(change(whole))
        said = called(*arguments)
        if (said.returncode, said.stdout, said.stderr.count("\n")) != (2, "", 1) or "there" not in said.stderr:
            found[what] = (said.returncode, said.stdout[:100], said.stderr[-500:])
    assert found == {}
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    faults.refused(tmp_path / "marker", len(MALFORMED))
    file.write_bytes(whole)
    assert reader == "train" or called(*arguments).returncode == 0
