"""Files that are no checkpoint, told from damaged ones; none of them blocks or takes long."""

import io
import os
import socket
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weights import error_of

from cspd.export.weights.checkpoint import load_mar, load_vae


@pytest.mark.parametrize(
    "content,expected",
    [
        (b"", "neither"),
        (b"\n<!DOCTYPE html><html><body>Too many downloads</body></html>", "web page"),
        (b"<html><head></head></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b'{"error": "gated repository"}', "neither"),
        (b"PK\x03\x04" + bytes(1000), "cut off"),
        (b"\x80\x02}q\x00(X\x05", "refused|damaged"),
        (bytes(2000), "neither"),
    ],
)
def test_other_files_are_recognised(tmp_path, content, expected):
    path = tmp_path / "checkpoint-last.pth"
    path.write_bytes(content)
    message = error_of(lambda: load_mar(path))
    assert str(path) in message
    assert any(word in message for word in expected.split("|"))


def zipped(names: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return out.getvalue()


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, first=np.zeros(3), second=np.zeros(3))
    return out.getvalue()


def script() -> bytes:
    """The names of what torch.jit.save writes, which is deprecated."""
    return zipped(dict.fromkeys(("a/data.pkl", "a/code/__torch__.py", "a/constants.pkl"), b""))


OTHERS = {
    "npz": (npz, "a NumPy archive of 2 arrays (first.npy, second.npy)", "torch.from_numpy"),
    "zip": (
        lambda: zipped({"mar/checkpoint-last.pth": b"x" * 100, "readme": b""}),
        "a zip archive of 2 files (mar/checkpoint-last.pth, readme)",
        "unpack it",
    ),
    "stored zip": (
        lambda: zipped({"kl16.ckpt": b"x" * 100}, zipfile.ZIP_STORED),
        "a zip archive of 1 files (kl16.ckpt)",
        "unpack it",
    ),
    "TorchScript": (script, "a TorchScript archive", "torch.jit.load(FILE).state_dict()"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(50), "a gzip archive", "unpack it"),
    "npy": (lambda: b"\x93NUMPY\x01\x00" + bytes(50), "a single NumPy array", "safetensors"),
    "GGUF": (lambda: b"GGUF" + bytes(50), "a GGUF file", "safetensors"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("load", [load_mar, load_vae])
def test_archives_are_not_called_damaged(tmp_path, load, case):
    make, what, action = OTHERS[case]
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(make())
    message = error_of(lambda: load(path))
    assert f"{path}: {what}" in message and action in message
    assert "damaged" not in message and "download" not in message


def test_archive_of_too_many_entries(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(zipped({f"a/data/{i}": b"" for i in range(20_000)} | {"a/data.pkl": b""}))
    assert "holds 20,001 tensors" in error_of(lambda: load_mar(path))


def test_safetensors_of_too_many_names(tmp_path):
    save_file({f"layer.{i}": torch.zeros(0) for i in range(20_001)}, tmp_path / "w.safetensors")
    message = error_of(lambda: load_mar(tmp_path / "w.safetensors"))
    assert "holds 20,001 tensors, expected at most 20,000" in message


@pytest.mark.parametrize("load", [load_mar, load_vae])
@pytest.mark.parametrize("kind", ["a device", "a socket"])
def test_what_is_no_regular_file(tmp_path, load, kind, monkeypatch):
    """A named pipe is in tests/fuzz, whose harness ends what blocks."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if kind == "a device":
        os.symlink("/dev/zero", path)
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind("w.pth")
    assert f"{path}: {kind}, expected a regular file" in error_of(lambda: load(path))
