# SPDX-License-Identifier: Apache-2.0
"""Shards, folders of diffusers' layout and odd names, of anybody: refused as test_hostile.py says, by every reader."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("peft")
from test_hostile import CONFIG, PARTS, WEIGHTS, Doors, lora_parts, model, refuse

from lrkern.files.folder import DIFFUSERS, INDEX, METADATA
from lrkern.files.names import as_peft
from lrkern.files.read import HEADER_BYTES

ONE, TWO = "adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"


@pytest.fixture
def doors(tmp_path):
    return Doors(tmp_path)


def sharded(folder, family="LORA"):
    """A good folder of two shards, and its index."""
    folder.mkdir()
    config, tensors = PARTS[family]()
    where = {key: (ONE, TWO)[i % 2] for i, key in enumerate(tensors)}
    for file in (ONE, TWO):
        save_file({k: t for k, t in tensors.items() if where[k] == file}, folder / file)
    (folder / CONFIG).write_text(json.dumps(config))
    return index(folder, where)


def index(folder, where):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def moved(to):
    """A shard moved to where the index says it is, and from there to be read, were it not for its name."""

    def damage(folder, where):
        (folder / "sub").mkdir()
        path = folder / to
        (folder / ONE).rename(path)
        index(folder, {k: to if v == ONE else v for k, v in where.items()})

    return damage


def absolute(folder, where):
    (folder / ONE).rename(folder.parent / ONE)
    index(folder, {k: str(folder.parent / ONE) if v == ONE else v for k, v in where.items()})


def of_index(text):
    return lambda folder, where: (folder / INDEX).write_bytes(
        text if isinstance(text, bytes) else json.dumps(text).encode()
    )


def called(file):
    return lambda folder, where: index(folder, where | {next(iter(where)): file})


def linked(file, to):
    def damage(folder, where):
        (folder / file).unlink()
        (folder / file).symlink_to(to)

    return damage


def piped(file):
    def damage(folder, where):
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return damage


def twice(folder, where):
    _, tensors = lora_parts()
    save_file({k: tensors[k] for k, v in where.items() if v == TWO or k == next(iter(where))}, folder / TWO)


def large(folder, where):
    """Two headers, neither too large by itself."""
    for file in (ONE, TWO):
        header = json.dumps(
            {k: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k, v in where.items() if v == file}
        )
        header = header.encode() + b" " * (HEADER_BYTES - 4096 - len(header))
        (folder / file).write_bytes(struct.pack("<Q", len(header)) + header)


BESIDE = "must name safetensors files beside it, got"
SHARDS = {
    "out of the folder": (moved(f"../{ONE}"), f"{BESIDE} '../adapter_model-00001"),
    "an absolute path": (absolute, f"{BESIDE} '/"),
    "in a folder below": (moved(f"sub/{ONE}"), f"{BESIDE} 'sub/"),
    "in a folder below and back": (moved(f"sub/../{ONE}"), f"{BESIDE} 'sub/\\.\\./"),
    "a hidden file": (moved(f".{ONE}"), f"{BESIDE} '\\.adapter"),
    "a pickle": (called("adapter_model.bin"), f"{BESIDE} 'adapter_model.bin'"),
    "nothing": (called(""), f"{BESIDE} ''"),
    "a name with a zero byte": (called("a\0.safetensors"), BESIDE),
    "a name with a new line": (called("a\n.safetensors"), BESIDE),
    "a very long name": (called("a" * 5000 + ".safetensors"), BESIDE),
    "a number": (called(7), "must have a weight_map of files by key, got"),
    "a folder": (lambda f, w: [(f / TWO).unlink(), (f / TWO).mkdir()], "adapter_model-00002.* must be a file, got a folder"),
    "a pipe": (piped(TWO), "adapter_model-00002.* must be a file, got a pipe"),
    "a device": (linked(TWO, "/dev/zero"), "must be a file, got a pipe, socket or device"),
    "not there": (lambda f, w: (f / TWO).unlink(), "adapter_model-00002.* cannot be read: No such file"),
    "cut": (lambda f, w: os.truncate(f / TWO, 99), "adapter_model-00002.* cannot be read: .*header"),
    "of two headers too large": (large, f"must have a header of at most {4096 + 8} bytes|must have a header of at most"),
    "a tensor twice": (twice, f"must hold what {INDEX} says it does, got .*, which is to be in '{ONE}'"),
    "a tensor of no file": (called(TWO), f"must hold what {INDEX} says it does, got"),
    "a tensor nobody has": (lambda f, w: index(f, w | {"x": ONE}), f"lacks x, which {INDEX} says is in {ONE}"),
    "a tensor nobody lists": (lambda f, w: index(f, dict(list(w.items())[1:])), "is to be in None"),
    "too many": (of_index({"weight_map": {str(i): f"{i}.safetensors" for i in range(1001)}}), "must name at most 1000 files, got 1001"),
    "no map": (of_index({"metadata": {}}), "must have a weight_map of files by key, got None"),
    "an empty map": (of_index({"weight_map": {}}), "must have a weight_map of files by key, got {}"),
    "a list for a map": (of_index({"weight_map": [ONE]}), "must have a weight_map of files by key, got"),
    "a list": (of_index([]), "must have a weight_map of files by key, got None"),
    "no JSON": (of_index(b"\x80\x04"), f"{INDEX} must be UTF-8"),
    "nested": (of_index(b"[" * 190_000), f"{INDEX} is nested too deeply"),
    "a key twice": (of_index(b'{"weight_map": {"a": "b", "a": "c"}}'), "'a' stands there twice"),
    "an index too long": (of_index(b" " * (HEADER_BYTES + 1)), f"{INDEX} must have at most {HEADER_BYTES} bytes"),
    "an index that is a device": (linked(INDEX, "/dev/zero"), f"{INDEX} must be a file, got a pipe"),
    "no index": (lambda f, w: (f / INDEX).unlink(), f"must hold {WEIGHTS}, or shards with {INDEX}"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_shards(doors, tmp_path, name):
    damage, message = SHARDS[name]
    folder = sharded(tmp_path / "bad")
    damage(folder, json.loads((folder / INDEX).read_text())["weight_map"])
    refuse(doors, doors.of_folder(folder), message)


@pytest.mark.parametrize("family", PARTS)
def test_good_shards_are_taken(doors, tmp_path, family):
    for call in doors.of_folder(sharded(tmp_path / "good", family), family):
        if "new" in doors.pool:
            doors.pool.remove("new")
        call()
        doors.base = model()


def with_tensors(tensors, about=None):
    def write(folder):
        folder.mkdir()
        save_file(tensors, folder / DIFFUSERS, metadata={"format": "pt"} | ({METADATA: about} if about else {}))
        return folder

    return write


FOLDERS = {
    "many parts": (with_tensors({f"{i}.x.lora_A.weight": torch.ones(1, 1) for i in range(4_000)}), "must have one part whose linears"),
    "a long name": (with_tensors({"." * 10**6 + ".lora_A.weight": torch.ones(1, 1)}), "must have one part"),
    "a long name of no form": (with_tensors({".alpha.lora" * 10**4 + "!": torch.ones(1, 1)}), "must have keys of lora_A.weight"),
    "many processors": (with_tensors({"unet" + ".processor.x" * 10**5 + ".lora_A.weight": torch.ones(1, 1)}), "must have one part"),
    "a nested header": (with_tensors({"a": torch.ones(1)}, "[" * 100_000), f"{METADATA} is nested too deeply"),
    "a header twice": (with_tensors({"a": torch.ones(1)}, '{"a": 1, "a": 2}'), "'a' stands there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_diffusers_folders(doors, tmp_path, name):
    make, message = FOLDERS[name]
    refuse(doors, doors.of_folder(make(tmp_path / "bad")), message)


LONG = "base_model.model.layers.0.q_proj"
NAMES = {
    "many compilers": "_orig_mod." * 100_000 + LONG + ".lora_A.weight",
    "many ends": LONG + ".lora_A" * 100_000,
    "many saved": LONG + ".modules_to_save" * 60_000 + ".weight",
    "many bases": LONG + ".base_layer" * 90_000 + ".weight",
    "a base of dots": "." * 10**6 + "base_layer.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_long_names(doors, name):
    config, tensors = lora_parts()
    tensors[NAMES[name]] = tensors.pop(f"{LONG}.lora_A.weight") + 1
    if name == "many compilers":  # of one module for certain
        assert as_peft(config, tensors, doors.base)[1].keys() == lora_parts()[1].keys()
    else:
        refuse(doors, [lambda: doors.pool.add("new", config, tensors)], "must hold lora_A.weight")


@pytest.mark.parametrize(
    "config", [{"modules_to_save": 7}, {"modules_to_save": [1]}, {"modules_to_save": {"a": 1}}], ids=str
)
def test_odd_modules_to_save(doors, config):
    given, tensors = lora_parts()
    weight = {f"{LONG}.weight": torch.ones(24, 16)}
    refuse(
        doors,
        [lambda: doors.pool.add("new", given | config, tensors | weight)],
        "modules_to_save must|weight of the base",
    )
