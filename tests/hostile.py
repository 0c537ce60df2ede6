"""Files made to harm: damaged, foreign, or written so that whoever opens them runs code or runs out of memory."""

from __future__ import annotations

import builtins
import os
import pickle
import random
import runpy
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from denoiselab import checkpoint


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def calls(marker: Path) -> dict[str, Call]:
    """Each would make the marker, if whoever opens it ran it."""
    text, code = str(marker), f"open({str(marker)!r}, 'w').close()"
    script = marker.with_name("script.py")
    script.write_text(code)
    return {
        "os.system": Call(os.system, f"touch {text}"),
        "os.mkdir": Call(os.mkdir, text),
        "subprocess.call": Call(subprocess.call, ["touch", text]),
        "exec": Call(builtins.exec, code),
        "eval": Call(builtins.eval, code),
        "Path.write_text": Call(Path.write_text, marker, "there"),
        "Path.touch": Call(Path.touch, marker),
        "runpy.run_path": Call(runpy.run_path, str(script)),
        "shutil.copyfile": Call(shutil.copyfile, str(script), text),
        "pickle in a pickle": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {text}"))),
        "numpy.ndarray.tofile": Call(np.ndarray.tofile, np.zeros(1), text),
    }


def executed(path: Path) -> bool:
    """Whether opening a pickle as `pickle.load` does makes its marker: the negative control."""
    marker = path.with_name("marker")
    assert not marker.exists()
    try:
        with path.open("rb") as file:
            pickle.load(file)
    except Exception:
        pass  # what follows the call need not be a pickle
    there = marker.exists()
    if there:
        marker.rmdir() if marker.is_dir() else marker.unlink()
    return there


Files = Iterator[tuple[str, Path, str]]
"""Names of files, the files, and what is said of them."""


def pickles(folder: Path, good: dict[str, Any], marker: Path) -> Files:
    """Code in a plain pickle, in a checkpoint as PyTorch writes it now, and as it wrote it before 1.6."""
    for name, call in calls(marker).items():
        plain, inside, old = (folder / f"{form} {name}.ckpt" for form in ("plain", "inside", "old"))
        plain.write_bytes(pickle.dumps({**good, "call": call}))
        torch.save({**good, "call": call}, inside)
        torch.save({**good, "call": call}, old, _use_new_zipfile_serialization=False)
        for file in (plain, inside, old):
            yield file.stem, file, "nothing was executed"


def bits(whole: bytes, start: int, end: int, n: int, seed: int) -> Iterator[bytes]:
    """Copies with one bit flipped between two places."""
    rng = random.Random(seed)
    for place in rng.sample(range(start, end), n):
        yield whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]


def damaged(folder: Path, good: Path) -> Files:
    """What disks, copies and mistakes make of a checkpoint; those with a bit flipped still have its sha256 beside."""
    whole, sums = good.read_bytes(), good.with_name(good.name + ".sha256")

    def file(name: str, content: bytes, verified: bool = False) -> Path:
        path = folder / f"{name}.ckpt"
        path.write_bytes(content)
        if verified:
            shutil.copy(sums, path.with_name(path.name + ".sha256"))
        return path

    yield "empty", file("empty", b""), "empty"
    yield "one byte", file("one byte", b"P"), "nothing was executed"
    yield "text", file("text", b"this is no checkpoint\n" * 9), "nothing was executed"
    for k in range(10):
        yield f"truncated {k}", file(f"truncated {k}", whole[: 5 + (len(whole) - 10) * k // 9]), "truncated"
    with zipfile.ZipFile(good) as archive:
        parts = {info.filename: info for info in archive.infolist()}
    pickled = next(info for name, info in parts.items() if name.endswith("/data.pkl"))
    tensors = max((info for name, info in parts.items() if "/data/" in name), key=lambda info: info.file_size)
    data = tensors.header_offset + 64
    for k, content in enumerate(bits(whole, data, data + tensors.file_size - 64, 50, seed=1)):
        yield f"a bit of a tensor {k}", file(f"tensor {k}", content, verified=True), "damaged"
    for k, content in enumerate(bits(whole, 0, pickled.file_size, 20, seed=2)):
        yield f"a bit of the head {k}", file(f"head {k}", content, verified=True), "damaged"
    (folder / "folder.ckpt").mkdir()
    yield "a folder", folder / "folder.ckpt", "no good checkpoint"
    os.mkfifo(folder / "pipe.ckpt")
    yield "a pipe", folder / "pipe.ckpt", "no such"
    (folder / "loop.ckpt").symlink_to(folder / "loop.ckpt")
    yield "a link to itself", folder / "loop.ckpt", "no such run|cannot be read"
    (folder / "nowhere.ckpt").symlink_to(folder / "nothing")
    yield "a link to nothing", folder / "nowhere.ckpt", "no such"
    distributed = folder / "distributed"
    distributed.mkdir()
    (distributed / ".metadata").write_bytes(pickle.dumps(Call(Path.touch, folder / "marker")))
    (distributed / "__0_0.distcp").write_bytes(b"0" * 64)
    yield "a folder of torch.distributed.checkpoint", distributed, "no good checkpoint"


def packed(folder: Path, good: Path) -> Files:
    """Archives that unpack to more than they are, and pickles that ask for more memory than the file has bytes."""
    with zipfile.ZipFile(good) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    inside = next(name for name in parts if name.endswith("/data.pkl"))

    def written(name: str, changed: dict[str, bytes], how: int = zipfile.ZIP_STORED, twice: bool = False) -> Path:
        path = folder / f"{name}.ckpt"
        with zipfile.ZipFile(path, "w", how) as archive:
            for part, content in {**parts, **changed}.items():
                archive.writestr(part, content)
                if twice and part == inside:
                    infos = archive.filelist.copy()
                    archive.NameToInfo.pop(part)  # or zipfile warns
                    archive.writestr(part, pickle.dumps(Call(os.system, "true"), 2))
                    assert len(archive.filelist) == len(infos) + 1
        return path

    tensor = next(name for name in parts if "/data/" in name)
    zeros = {tensor: bytes(50_000_000)}
    yield "packed zeros", written("packed zeros", zeros, zipfile.ZIP_DEFLATED), "packed"
    yield "a part twice", written("a part twice", {}, twice=True), "overlap or have one name"
    yield "half a tensor", written("half a tensor", {tensor: parts[tensor][:1]}), "truncated"
    yield "no pickle", written("no pickle", {inside: b""}), "truncated, or not"
    deep = {inside: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."}
    yield "100,000 lists in one another", written("deep", deep), "not a denoiselab checkpoint"
    alias = {inside: b"\x80\x02cbuiltins\nbytearray\n" + b"\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R."}
    yield "100 GB of zeros in a line", written("zeros", alias), "builtins.bytearray"


Change = Callable[[dict[str, Any]], object]


def _record(**values: Any) -> Change:
    return lambda content: content["denoiselab"].update(values)


def _interface(**values: Any) -> Change:
    return lambda content: content["denoiselab"]["interface"].update(values)


def _config(old: str, new: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        assert old in content["denoiselab"]["config"], old
        content["denoiselab"]["config"] = content["denoiselab"]["config"].replace(old, new, 1)

    return change


def _weight(make: Callable[[torch.Tensor], Any]) -> Change:
    """Of the EMA's first weights."""

    def change(content: dict[str, Any]) -> None:
        name = next(n for n, t in content["state_dict"].items() if n.startswith("ema.model.") and t.ndim == 2)
        content["state_dict"][name] = make(content["state_dict"][name])

    return change


def _doubled() -> dict[str, Any]:
    node: dict[str, Any] = {"a": 1}
    for _ in range(28):
        node = {"a": node, "b": node}
    return node


def _lists(depth: int) -> str:
    return f"deep: {'[' * depth}{']' * depth}\n"


def _repeated(word: str) -> str:
    """Nine lines that stand for 10**9 values."""
    first = f"a0: &a0 [{', '.join([word] * 10)}]\n"
    return first + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 9))


MODEL, TARGET, SCHEDULE = "denoiselab.models.MLP", "denoiselab.target.", "denoiselab.schedule."
REFUSED, LOOKS = "nothing was run", "looks up what is on this machine; nothing was run"

INSIDE: dict[str, tuple[Change, str]] = {
    "a wrong shape": (_weight(lambda w: w[:-1]), "do not fit"),
    "a wrong dtype": (_weight(lambda w: w.to(torch.int64)), "do not fit"),
    "half precision": (_weight(lambda w: w.half()), "do not fit"),
    "NaN": (_weight(lambda w: w * torch.nan), "not finite"),
    "infinity": (_weight(lambda w: w + torch.inf), "not finite"),
    "a value for a tensor": (_weight(lambda w: 3.0), "not a tensor"),
    "a tensor of one value 2**33 times": (_weight(lambda w: torch.zeros(1).expand(2**33)), "claims tensors"),
    "a tensor without values": (_weight(lambda w: w.to("meta")), "_rebuild_meta_tensor"),
    "a sparse tensor": (_weight(lambda w: w.to_sparse()), "_rebuild_sparse_tensor"),
    "a quantized tensor": (
        _weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        "_rebuild_qtensor",
    ),
    "no EMA": (
        lambda c: c.update(state_dict={k: v for k, v in c["state_dict"].items() if not k.startswith("ema.model.")}),
        "holds no ema weights",
    ),
    "no names": (lambda c: c.update(state_dict={3: torch.zeros(1)}), "'3' is not a tensor"),
    "no weights": (lambda c: c.pop("state_dict"), "no 'state_dict'"),
    "a step of words": (lambda c: c.update(global_step="many"), "no 'global_step'"),
    "a step before the first": (lambda c: c.update(global_step=-1), "global_step"),
    "a later layout": (_record(version=99), "upgrade"),
    "no record": (lambda c: c.update(denoiselab={}), "layout None"),
    "another's schedule": (_record(fingerprint="other"), "was trained along"),
    "hyper_parameters with an _instantiator": (
        lambda c: c.update(hyper_parameters={"_instantiator": "os.system", "_class_path": "os.system"}),
        "hyper_parameters",
    ),
    "a shape of words": (_interface(shape="wide"), "shape"),
    "a shape of 10**18": (_interface(shape=[10**6] * 3), "shape"),
    "a shape below 1": (_interface(shape=[-2]), "shape"),
    "classes of words": (_interface(num_classes="many"), "num_classes"),
    "10**12 classes": (_interface(num_classes=10**12), "num_classes"),
    "no vector": (_interface(vector=None), "vector"),
    "no codec": (_interface(codec=None), "codec"),
    "a codec that is code": (_interface(codec={"_target_": "os.system", "command": "true"}), REFUSED),
    "a codec that is a network": (_interface(codec={"_target_": "denoiselab.models.MLP"}), "another group"),
    "an interface of 2**28 values": (lambda c: c["denoiselab"]["interface"].update(more=_doubled()), "more than"),
    "choices of numbers": (_record(choices={"metrics": 3}), "choices"),
    "a configuration of bytes": (_record(config="\x00\x01"), "not YAML"),
    "no configuration": (_record(config=""), "not a configuration"),
    "a list": (_record(config="[1, 2]"), "not a configuration"),
    "half a mapping": (_record(config="a: {"), "not YAML"),
    "2 MB": (_record(config="a: " + "x" * 2_000_000), "1 MB is the most"),
    "10**9 values by reference": (_record(config=_repeated("x")), "refers to parts of itself"),
    "a list in itself": (_record(config="a: &a [*a]"), "refers to parts of itself"),
    "40 lists in one another": (lambda c: _record(config=c["denoiselab"]["config"] + _lists(40))(c), "nested deeper"),
    "50,000 lists in one another": (_record(config=_lists(50_000)), "not YAML"),
    "an object of Python": (_record(config='a: !!python/object/apply:os.system ["true"]'), "not YAML"),
    "a name of Python": (_record(config="a: !!python/name:os.system"), "not YAML"),
    "no number": (_record(config="a: !!int x"), "not YAML"),
    "no day": (_record(config="a: 2020-99-99"), "not YAML"),
    "no truth": (_record(config="a: !!bool x"), "not YAML"),
    "no loss": (lambda c: _record(config=c["denoiselab"]["config"].replace("\nloss:", "\nlost:"))(c), "its loss"),
    "code for a network": (_config(MODEL, "os.system"), REFUSED),
    "code for a target": (_config(TARGET, "subprocess.run #"), REFUSED),
    "code for a schedule": (_config(SCHEDULE, "torch.hub.load #"), REFUSED),
    "code behind a module of ours": (_config(MODEL, "denoiselab.run_folder.subprocess.run"), REFUSED),
    "a walk out of torch.nn": (_config(MODEL, "torch.nn.modules.module.torch.utils.collect_env.run"), REFUSED),
    "an unsafe load": (_config(MODEL, "torch.load"), REFUSED),
    "a private name": (_config(MODEL, "denoiselab._torchvision.install"), REFUSED),
    "a network for a schedule": (_config(SCHEDULE, "denoiselab.models.MLP #"), "another group"),
    "data for a network": (_config(MODEL, "denoiselab.data.Digits"), "another group"),
    "a callback for data": (
        _config("denoiselab.data.EightGaussians", "denoiselab.callbacks.SampleGrid"),
        "another group",
    ),
    "a network of 10**9 wide layers": (_config("width: 8", "width: 1000000"), "do not fit"),
    "a width of words": (_config("width: 8", "width: wide"), "width"),
    "an argument that nobody has": (_config("width: 8", "breadth: 8"), "breadth"),
    "a look-up of the environment": (_config("width: 8", "width: ${oc.env:WANDB_API_KEY}"), LOOKS),
    "a look-up in a text": (_config("width: 8", "width: a${oc.env:HOME,b}c"), LOOKS),
    "a look-up in a look-up": (_config("width: 8", "width: ${oc.decode:${oc.env:HOME}}"), LOOKS),
    "a resolver": (_config("width: 8", "width: ${hydra:runtime.cwd}"), LOOKS),
    "a resolver that makes": (_config("width: 8", "width: ${oc.create:{a:1}}"), LOOKS),
}
"""Changes of what a checkpoint says, each written with its own sha256, and what is said of it."""


def inside(folder: Path, good: Path) -> Files:
    for name, (change, reason) in INSIDE.items():
        content = checkpoint.load(good)
        change(content)
        path = folder / f"{name.replace('/', ' ')}.ckpt"
        checkpoint.save(content, path)
        yield name, path, reason


def everything(folder: Path, good: Path) -> Files:
    """All of them, in a folder with `marker`, which code in them would make."""
    folder.mkdir()
    yield from damaged(folder, good)
    yield from packed(folder, good)
    yield from inside(folder, good)
    yield from pickles(folder, checkpoint.load(good), folder / "marker")
