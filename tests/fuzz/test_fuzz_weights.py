"""Checkpoints nobody vouches for: nothing in them runs, whatever they declare."""

import argparse
import collections
import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from harness import FILE_SIZE, budget, check, run_case, run_here
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import ODD, apply, damaged, edits
from safetensors.torch import save as save_safetensors

from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS
from cspd.export.weights.checkpoint import load_mar, load_vae

with torch.device("meta"):
    SHAPES = {
        name: tuple(t.shape) for name, t in Mar(PRESETS["fashion-draft"]).state_dict().items()
    }
# One stored number per tensor: a checkpoint of the right shapes in a few kilobytes.
STATE = {name: torch.zeros(1).expand(shape) for name, shape in SHAPES.items()}


def pth(content: object, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


GOOD = {zipped: pth({"model_ema": STATE, "args": argparse.Namespace(lr=1)}, zipped)
        for zipped in (True, False)}  # fmt: skip
SMALL = save_safetensors({"model.a": torch.zeros(4, 4), "b": torch.zeros(3)})


def load(arena, target: str, content: bytes, name: str = "checkpoint.pth"):
    """Both intakes, with and without a preset; no file may appear beside the checkpoint."""
    folder = arena.fresh()
    path = folder / name
    path.write_bytes(content)
    calls = {
        "mar": lambda: load_mar(path, "fashion-draft", allow_non_ema=True),
        "any": lambda: load_mar(path, num_heads=4, allow_non_ema=True),
        "vae": lambda: load_vae(path),
    }
    for call in calls.values():
        check(run_here(target, call, folder))
        assert [found.name for found in folder.iterdir()] == [name], "a file appeared"


@pytest.mark.parametrize("zipped", [True, False])
def test_the_untouched_checkpoint_loads(arena, zipped):
    path = arena.fresh() / "checkpoint.pth"
    path.write_bytes(GOOD[zipped])
    call = run_case("weights: damaged .pth", lambda: load_mar(path, "fashion-draft"), path.parent)
    assert call.kind == "ok"


@budget(full=100, ci=4)
@given(content=damaged(GOOD[True]))
def test_damaged_zip(arena, content):
    load(arena, "weights: damaged .pth", content)


@budget(full=100, ci=4)
@given(content=damaged(GOOD[False]))
def test_damaged_old_format(arena, content):
    load(arena, "weights: damaged .pth", content)


HTML = (b"<!DOCTYPE html><html>", b"\n <html>", b"<?xml version='1.0'?>", b"{\"error\": 1}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"<HEAD>")  # fmt: skip


@budget(full=60, ci=3)
@given(start=st.sampled_from(HTML), rest=st.binary(max_size=600),
       name=st.sampled_from(["a.ckpt", "a.pth", "a.safetensors"]))  # fmt: skip
def test_stubs_of_failed_downloads(arena, start, rest, name):
    load(arena, "weights: stubs", start + rest, name)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(folder: str) -> list[Call]:
    """Calls that would leave something behind."""
    path = os.path.join(folder, "owned")
    return [
        Call(os.mkdir, path),
        Call(os.system, f"touch {path}"),
        Call(open, path, "w"),
        Call(eval, f"open({path!r}, 'w')"),
        Call(exec, f"open({path!r}, 'w')"),
        Call(getattr, Call(__import__, "os"), "mkdir"),
        Call(torch.load, path),
        Call(torch.save, 1, path),
        Call(torch.hub.load, "a/b", "c"),
        Call(pickle.loads, pickle.dumps(Call(os.mkdir, path))),
        Call(__import__, "os"),
        Call(collections.Counter, "aab"),
    ]


def hide(attack: object, where: int, depth: int) -> object:
    """A checkpoint with `attack` somewhere inside, also behind what is allowed."""
    options = argparse.Namespace(model="mar_base")
    value = attack
    for _ in range(depth):
        value = [value]
    match where:
        case 0:
            return value
        case 1:
            return {"model_ema": value}
        case 2:
            options.extra = value
            return {"model_ema": STATE, "args": options}
        case 3:
            return {"model_ema": {**STATE, "z_proj.bias": value}}
        case 4:
            return collections.OrderedDict(model_ema=STATE, optimizer=value)
        case _:
            options.__dict__["__class__"] = value
            options.__dict__["__reduce__"] = value
            return {"args": options, "model": STATE, "model_ema": STATE}


@budget(full=150, ci=10)
@given(
    number=st.integers(0, 11), where=st.integers(0, 5), depth=st.integers(0, 3),
    form=st.sampled_from(["zip", "old", "plain", "protocol 4"]),
)  # fmt: skip
def test_pickles_that_call_something(arena, number, where, depth, form):
    content = hide(attacks(str(arena.root / "case"))[number], where, depth)
    if form in ("zip", "old"):
        data = pth(content, form == "zip")
    else:
        data = pickle.dumps(content, protocol=4 if form == "protocol 4" else 2)
    load(arena, "weights: pickles with calls", data)


# Stack programs of a pickle: opcodes that build, store, fetch and join.
OPCODES = [b"(", b")", b"]", b"}", b"t", b"l", b"d", b"0", b"1", b"2", b"a", b"e", b"s", b"u", b"b",
           b"R", b"Q", b"N", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"K\x07",
           b"X\1\0\0\0a",
           b"q\0", b"q\1", b"h\0", b"h\1", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\x7f" * 8,
           b"ctorch._utils\n_rebuild_tensor_v2\n", b"cargparse\nNamespace\n", b"\x81",
           b"ccollections\nOrderedDict\n", b"cos\nsystem\n", b"ctorch\nFloatStorage\n",
           b"\x95" + b"\xff" * 7 + b"\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f",
           b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"I10\n", b"F1e999\n",
           b"cos\nmkdir\n"]  # fmt: skip
# Pairs of the same pair, 2 ** 60 leaves, in memo 0.
DOUBLED = b")" + b"q\0h\0h\0\x86" * 60 + b"q\0"

WIDE = b")" + (b"q\0(" + b"h\0" * 200 + b"t") * 6 + b"q\0"


def zipped_pickle(program: bytes) -> bytes:
    """A checkpoint file whose pickle is `program`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


@budget(full=300, ci=10)
@given(program=st.lists(st.sampled_from(OPCODES), max_size=30).map(b"".join), bare=st.booleans())
@example(program=DOUBLED, bare=False)  # nested pairs of one object: 2 ** 60 leaves
@example(program=DOUBLED + b"}h\0Ns", bare=False)  # ... as a key, which is hashed
@example(program=DOUBLED + b"}h\0Ns", bare=True)
@example(program=b"}(" + b"X\5\0\0\0modelcollections\nOrderedDict\n)R" + b"u", bare=False)
@example(program=b"(" * 100_000, bare=False)
@example(program=WIDE + b"}h\0Ns", bare=False)  # six tuples of 200, each of the one before
@example(program=b"]" + b"q\0h\0a" * 3, bare=False)
@example(program=b"](" + b"](" * 20_000 + b"e" * 20_000, bare=False)
def test_pickle_programs(arena, program, bare):
    content = b"\x80\x02" + program + b"." if bare else zipped_pickle(program)
    load(arena, "weights: pickle programs", content)


MANY_NAMES = b"}(" + b"".join(b"X\6\0\0\0%06dN" % number for number in range(300_000)) + b"u"


@pytest.mark.parametrize("program", [b"N0" * 5_000_000, MANY_NAMES], ids=["10 MB", "300,000 names"])
@pytest.mark.parametrize("bare", [True, False])
def test_long_programs(arena, program, bare):
    folder = arena.fresh()
    path = folder / "checkpoint.pth"
    path.write_bytes(b"\x80\x02" + program + b"." if bare else zipped_pickle(program))
    ending = check(run_here("weights: pickle programs", lambda: load_mar(path), folder))
    assert "more than 300,000 operations" in ending.text


def declared(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with `header`, which may declare anything."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SIZE = st.sampled_from(
    [0, 1, 4, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1]
)


@budget(full=250, ci=8)
@given(
    shape=st.lists(SIZE, max_size=4), offsets=st.lists(st.one_of(SIZE, ODD), max_size=3),
    dtype=st.sampled_from(["F32", "F64", "I8", "BOOL", "F8_E4M3", "C64", "U64", "X", ""]),
    name=st.sampled_from(["diffusion_pos_embed_learned", "a\nb", "", "__metadata__", "\u202e"]),
    size=st.integers(0, 64),
)  # fmt: skip
@example(shape=[2**40], offsets=[0, 2**42], dtype="F32", name="a", size=0)
@example(shape=[2**62, 4], offsets=[0, 0], dtype="F32", name="a", size=0)
@example(shape=[0, 2**62], offsets=[0, 0], dtype="F32", name="a", size=0)
def test_safetensors_that_declare_anything(arena, shape, offsets, dtype, name, size):
    content = declared({name: tensor(shape, offsets, dtype)}, bytes(size))
    load(arena, "weights: declared sizes", content, "a.safetensors")


@budget(full=250, ci=8)
@given(content=damaged(SMALL))
@example(content=declared(b"{}", length=99 << 20))
@example(content=declared(b"{}", length=2**63))
@example(content=declared(b"{" + b"[" * 200_000))
@example(content=declared(b'{"a":' * 100_000))
def test_damaged_safetensors(arena, content):
    load(arena, "weights: damaged safetensors", content, "a.safetensors")


@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors.index.json"])
def test_named_pipe(arena, name):
    """Opening one for reading waits for somebody who writes."""
    path = arena.fresh() / name
    os.mkfifo(path)
    for call in (lambda: load_mar(path), lambda: load_vae(path), lambda: load_mar(path.parent)):
        ending = check(run_here("weights: named pipes", call, path.parent))
        assert "a named pipe" in ending.text or name in ending.text


INDEX = {"metadata": {"total_size": 1}, "weight_map": {"model.a": "s1.safetensors",
                                                      "b": "s2.safetensors"}}  # fmt: skip


@budget(full=250, ci=8)
@given(changes=edits(INDEX))
def test_indexes_of_shards(arena, changes):
    folder = arena.fresh()
    (folder / "s1.safetensors").write_bytes(save_safetensors({"model.a": torch.zeros(4, 4)}))
    (folder / "s2.safetensors").write_bytes(save_safetensors({"b": torch.zeros(3)}))
    (folder / "model.safetensors.index.json").write_bytes(apply(INDEX, changes))
    for call in (
        lambda: load_mar(folder, num_heads=4, allow_non_ema=True),
        lambda: load_vae(folder),
    ):
        ending = check(run_here("weights: indexes of shards", call, folder))
        assert ending.kind == "refused"


def shaped(changes: dict[str, tuple[int, ...] | None]) -> bytes:
    """A .pth of the draft's shapes with `changes`; None takes a tensor away. A few kilobytes."""
    shapes = {name: shape for name, shape in {**SHAPES, **changes}.items() if shape is not None}
    return pth({"model_ema": {n: torch.zeros(()).expand(s) for n, s in shapes.items()}})


RANK = st.lists(st.sampled_from([0, 1, 2, 49, 53, 96, 10**6, 2**40]), max_size=4).map(tuple)
KEYS = ("diffusion_pos_embed_learned", "encoder_pos_embed_learned", "class_emb.weight",
        "diffloss.net.input_proj.weight", "encoder_blocks.0.norm1.weight")  # fmt: skip
EXTRA = (
    "encoder_blocks.999999999.x",
    "diffloss.net.res_blocks.5000000.y",
    "a\nb\x1b[31m",
    "x" * 9000,
)


@budget(full=150, ci=8)
@given(changes=st.dictionaries(st.sampled_from([*KEYS, *EXTRA]), st.one_of(st.none(), RANK),
                               min_size=1, max_size=2))  # fmt: skip
@example(changes={"diffusion_pos_embed_learned": (49,)})
@example(changes={"class_emb.weight": ()})
@example(changes={"encoder_pos_embed_learned": (1,)})
@example(changes={"diffloss.net.input_proj.weight": (96,)})
@example(changes={"encoder_blocks.999999999.x": (1,)})
@example(changes={"diffloss.net.res_blocks.5000000.y": (1,)})
@example(changes={"class_emb.weight": (2**62, 96)})
def test_shapes_of_other_networks(arena, changes):
    try:
        content = shaped(changes)
    except RuntimeError:  # more elements than a number can count: torch itself refuses to write it
        return
    load(arena, "weights: other shapes", content)


ODD_KEYS = [{1: torch.zeros(1)}, {None: torch.zeros(1)}, {(1, 2): torch.zeros(1)}, {b"a": 1}]
ODD_TENSORS = [torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64),
               torch.zeros(1).to_sparse(),
               torch.nn.Parameter(torch.zeros(1)), torch.zeros(0),
               torch.zeros(1, device="meta")]  # fmt: skip


@pytest.mark.parametrize("state", ODD_KEYS, ids=range(len(ODD_KEYS)))
@pytest.mark.parametrize("wrapped", ["model_ema", "model", None])
def test_keys_that_are_no_names(arena, state, wrapped):
    load(arena, "weights: odd keys and tensors", pth({wrapped: state} if wrapped else state))


@pytest.mark.parametrize("number", range(len(ODD_TENSORS)))
def test_tensors_of_other_kinds(arena, number):
    for name in ("z_proj.bias", "diffusion_pos_embed_learned"):
        content = pth({"model_ema": {**STATE, name: ODD_TENSORS[number]}})
        load(arena, "weights: odd keys and tensors", content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_storages_that_unpack_to_more(arena, compression):
    """A zip whose storage is a bomb, or is declared larger than it is."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD[True])) as good, zipfile.ZipFile(out, "w") as bad:
        for item in good.infolist():
            content = good.read(item)
            if item.filename.endswith("/data/0"):
                size = (1 << 20) if compression == zipfile.ZIP_STORED else (256 << 20)
                with _entry(bad, item.filename, compression) as entry:
                    for _ in range(size >> 20):
                        entry.write(bytes(1 << 20))
                continue
            bad.writestr(item.filename, content)
    assert len(out.getvalue()) < FILE_SIZE
    load(arena, "weights: odd keys and tensors", out.getvalue())


def _entry(archive: zipfile.ZipFile, name: str, compression: int):
    info = zipfile.ZipInfo(name)
    info.compress_type = compression
    return archive.open(info, "w", force_zip64=True)
