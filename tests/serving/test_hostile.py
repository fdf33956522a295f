# SPDX-License-Identifier: Apache-2.0
"""Folders and files that anybody may have written: each refused as a ValueError, soon, beside other threads, and nothing changes."""

import json
import os
import resource
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

pytest.importorskip("peft")
import lrkern.files
import lrkern.peft
from lrkern.files import store_projections
from lrkern.nn import FusedLoRALinear, NOLALinear, VeRALinear
from lrkern.serving import AdapterPool

WITHIN = 3.0  # seconds; a free core takes under one, this machine may be busy
MEMORY = 300 << 20  # the pools and models here take a few MB
R, I, O = 4, 16, 24
LONG = "a" * 27  # what backtracks over it takes seconds, so that a planted fault fails and does not hang
NAMES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", f"layers.1.{LONG}")


def model(make=lambda linear: linear):
    torch.manual_seed(0)
    layer = lambda *names: nn.ModuleDict({name: make(nn.Linear(I, O)) for name in names})
    return nn.ModuleDict({"layers": nn.ModuleList([layer("q_proj", "v_proj"), layer("q_proj", LONG)])}).eval()


def lora_parts():
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", LONG],
        "bias": "none",
    }
    ab = {"lora_A": (R, I), "lora_B": (O, R)}
    return config, {f"base_model.model.{n}.{k}.weight": torch.ones(s) for n in NAMES for k, s in ab.items()}


def vera_parts():
    config = {"peft_type": "VERA", "r": R, "projection_prng_key": 1, "save_projection": False, "bias": "none"}
    db = {"vera_lambda_d": (R,), "vera_lambda_b": (O,)}
    return config, {f"base_model.model.{n}.{k}": torch.ones(s) for n in NAMES for k, s in db.items()}


def miss_parts():
    config = {"peft_type": "MISS", "r": R, "init_weights": True, "target_modules": ["q_proj", "v_proj", LONG]}
    return config, {f"base_model.model.{n}.miss_block": torch.ones(R, O) for n in NAMES}


def mora_parts():
    """As MoRA's authors' code writes them: r̂ of rank 4 is 13."""
    config, _ = lora_parts()
    config |= {"use_mora": True, "mora_type": 2}
    return config, {f"base_model.model.{n}.lora_{x}.weight": torch.ones(13, 13) for n in NAMES for x in "AB"}


PARTS = {"LORA": lora_parts, "VERA": vera_parts, "MISS": miss_parts, "MORA": mora_parts}


def write(folder, parts):
    folder.mkdir()
    config, tensors = parts
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Doors:
    """All that reads files, each with what it must leave as it was."""

    def __init__(self, tmp_path):
        self.tmp, self.base = tmp_path, model()
        self.fused = model(lambda linear: FusedLoRALinear.from_linear(linear, r=R, lora_alpha=8))
        self.pool = AdapterPool(self.base, pages=3)
        self.pool.add("lora", *lora_parts())
        self.pool.add("vera", *vera_parts())
        self.pool.pin("lora")

    def state(self):
        pool, held = self.pool, []
        for m in (self.base, self.fused):
            held += [(k, v.clone()) for k, v in m.state_dict().items()] + [str(m)]
        held += [t.clone() for layer in pool._layers.values() for t in (layer.a, layer.b)]
        held += [pool.names, pool.resident, list(pool._free), dict(pool._adapters), set(pool._reserved)]
        pairs = [over.pair for kind in pool._kinds for over in getattr(kind, "over", ())]
        return [*held, pairs, sorted(self.tmp.glob("to*"))]

    def of_folder(self, path, family="LORA"):
        yield lambda: self.pool.load("new", path)
        yield lambda: self.pool.load("lora", path, replace=True)
        if family in ("MISS", "MORA"):
            yield lambda: lrkern.files.load(self.base, path)
        elif family == "VERA":
            yield lambda: store_projections(path, self.base, self.tmp / "to")
        else:
            yield lambda: lrkern.peft.load_adapter(self.fused, path)
            yield lambda: lrkern.files.load(self.fused, path)

    def of_file(self, path):
        yield lambda: self.pool.load("new", path)
        yield lambda: self.pool.load("lora", path, replace=True)
        yield lambda: lrkern.files.load(self.base, path)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def ours(error):
    """Refused in lrkern's own words, not caught on its way out of something that it broke."""
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    return all(isinstance(e, ValueError | OSError | RecursionError) for e in causes)


def refuse(doors, calls, message="", gaps=()):
    """Every call is refused, in time, and changes nothing. What is late on a busy machine is tried again."""
    calls = list(calls)
    for _ in range(3):
        if gaps:
            gaps[:] = [0.0]
        late = _refuse(doors, calls, message) + [gap for gap in gaps if gap > WITHIN / 2]
        if not late:
            return
    pytest.fail(f"refused late, or another thread stood still, for {late} s")


def _refuse(doors, calls, message):
    before, most, late = doors.state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for call in calls:
        start = time.monotonic()
        with pytest.raises(ValueError, match=message or ".") as refusal:
            call()
        late += [t for t in [time.monotonic() - start] if t > WITHIN]
        assert ours(refusal.value), repr(refusal.value.__cause__)
        assert len(str(refusal.value)) < 2000 and str(refusal.value).isprintable()
        assert same(doors.state(), before)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) << 10 < MEMORY
    return late


@pytest.fixture
def doors(tmp_path):
    return Doors(tmp_path)


@pytest.fixture
def running():
    """Another thread, which must run all along."""
    gaps, end = [0.0], threading.Event()

    def run():
        last = time.monotonic()
        while not end.wait(0.002):
            last, before = time.monotonic(), last
            gaps.append(last - before)

    thread = threading.Thread(target=run)
    thread.start()
    yield gaps
    end.set()
    thread.join()


def test_the_parts_themselves_are_taken(doors, tmp_path):
    for family, parts in PARTS.items():
        for call in doors.of_folder(write(tmp_path / family, parts()), family):
            if "new" in doors.pool:
                doors.pool.remove("new")
            call()
            doors.base = model()
    assert (tmp_path / "to").is_dir()
    for call in doors.of_file(own_file(tmp_path / "own")):
        if "new" in doors.pool:
            doors.pool.remove("new")
        call()


# ---- configs, as files and as they are given to pool.add

LATE = "must match this model's names within 0.2 s of work"
REGEX = {  # what a config's regexes are, and what is said of them
    "backtracks": (r"layers\.1\.(a+)+!", LATE),
    "backtracks over groups": (r"layers\.1\.(?:(?:a|aa)+)+!", LATE),
    "backtracks over looks": (r"(?=layers)layers\.1\.(?:(?=a)a+)+!", LATE),
    "backtracks over references": (r"layers\.1\.(?P<g>a)(?:(?P=g)+)+!", LATE),
    "backtracks without a repeat": (r"layers\.1\." + "(a|.|[ab])" * 17 + "!", LATE),
    "backtracks over options": (r"layers\.1\." + "a?" * 28 + "!", LATE),
    "many stars": (r"layers\.1\." + "a*" * 12 + "!", LATE),
    "no regex": ("((", "is no regex: .*, got"),
    "nested": ("(" * 5000 + "a" + ")" * 5000, "is nested too deeply"),
    "a repeat out of range": ("a{99999999999999999999}", "is nested too deeply or too large"),
    "compiled for long": ("(?i:" + "[\u0000-\U0010ffff]" * 300 + ")", LATE),
}
CASES = {
    "r missing": ({"r": None}, "r of .* must be a whole number|r must be a whole number"),
    "r 0": ({"r": 0}, r"rank must lie in|must have shape|must have r=4|above 0"),
    "r true": ({"r": True}, "r must be a whole number from 0 to 2147483647, got True"),
    "r a float": ({"r": 4.0}, "r must be a whole number from 0 to 2147483647, got 4.0"),
    "r negative": ({"r": -4}, "r must be a whole number from 0 to 2147483647, got -4"),
    "r 2^31 - 1": ({"r": 2**31 - 1}, "must have shape|must have r=4"),
    "r 2^63": ({"r": 2**63}, "r must be a whole number from 0 to 2147483647, got 9223372036854775808"),
    "r of 400 digits": ({"r": 10**400}, r"r must be a whole number from 0 to 2147483647, got 10000\d*\.\.\.0+"),
    "r 40 million": ({"r": 40_000_000}, "must have shape|must have r=4"),
    "r a string": ({"r": "4"}, "r must be a whole number .* got '4'"),
    "r a list": ({"r": [4]}, "r must be a whole number .* got \\[4\\]"),
    "a family that is a list": ({"peft_type": ["LORA"]}, "peft_type must be a string, got \\['LORA'\\]"),
    "a family that is an object": ({"peft_type": {}}, "peft_type must be a string, got {}"),
    "a family that is null": ({"peft_type": None}, "peft_type(=| must be).*None"),
    "bias a list": ({"bias": ["none"]}, "bias must be a string, got \\['none'\\]"),
    "fan_in_fan_out a word": ({"fan_in_fan_out": "no"}, "fan_in_fan_out must be true or false, got 'no'"),
    "targets a number": ({"target_modules": 7}, "target_modules must be a string or a list of strings, got 7"),
    "targets an object": ({"target_modules": {"q_proj": 1}}, "target_modules must be a string or a list of strings"),
    "targets a list of lists": ({"target_modules": [["q_proj"]]}, "target_modules must be a string or a list of strings"),
    "targets nested deeply": ({"target_modules": json.loads("[" * 300 + "]" * 300)}, "target_modules must be a string"),
    "targets very long": ({"target_modules": 5}, "target_modules must be a string or a list of strings, got 5"),
    "excluded numbers": ({"exclude_modules": [1, 2]}, "exclude_modules must be a string or a list of strings"),
    "layers_to_transform a word": ({"layers_to_transform": "0"}, "layers_to_transform must be a whole number or a list"),
    "layers_to_transform floats": ({"layers_to_transform": [0.0]}, "layers_to_transform must be a whole number or a list"),
    "layers_to_transform true": ({"layers_to_transform": True}, "layers_to_transform must be a whole number or a list"),
    "layers_pattern numbers": ({"layers_pattern": [1], "layers_to_transform": [0]}, "layers_pattern must be a string or"),
}  # fmt: skip
LORA_CASES = {
    "alpha beyond fp32": ({"lora_alpha": 1e39}, r"lora_alpha must be a finite number \(in float32\), got 1e\+39"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "lora_alpha must be a finite number .*, got 1000"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number .*, got inf"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number .*, got nan"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha must be a finite number .*, got True"),
    "alpha an object": ({"lora_alpha": {}}, "lora_alpha must be a finite number .*, got {}"),
    "use_rslora a word": ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
    "use_rslora 1": ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
    "use_dora a word": ({"use_dora": "false"}, "use_dora must be true or false, got 'false'"),
    "lora_bias a word": ({"lora_bias": "no"}, "lora_bias must be true or false, got 'no'"),
    "init a list": ({"init_lora_weights": ["pissa"]}, "init_lora_weights must be true, false or a string"),
    "rank_pattern a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object of whole numbers by regex"),
    "rank_pattern a string": ({"rank_pattern": "q_proj"}, "rank_pattern must be an object of whole numbers by regex"),
    "rank_pattern words": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern must be an object of whole numbers by regex"),
    "rank_pattern true": ({"rank_pattern": {"q_proj": True}}, "rank_pattern must be an object of whole numbers by regex"),
    "rank_pattern 2^63": ({"rank_pattern": {"q_proj": 2**63}}, "rank_pattern must be an object of whole numbers by regex"),
    "rank_pattern large": ({"rank_pattern": {"q_proj": 10**9}}, "must have shape|must have r=4"),
    "alpha_pattern words": ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern must be an object of finite numbers"),
    "alpha_pattern 1e39": ({"alpha_pattern": {"q_proj": 1e39}}, "alpha_pattern must be an object of finite numbers"),
}  # fmt: skip
VERA_CASES = {
    "key null": ({"projection_prng_key": None}, "projection_prng_key must be a 64-bit integer, got None"),
    "key 2^64": (
        {"projection_prng_key": 2**64},
        "projection_prng_key must be a 64-bit integer, got 18446744073709551616",
    ),
    "key a float": ({"projection_prng_key": 1.0}, "projection_prng_key must be a 64-bit integer, got 1.0"),
    "save_projection a word": ({"save_projection": "false"}, "save_projection must be true or false, got 'false'"),
}


def configs():
    for name, (change, message) in CASES.items():
        for family in PARTS:
            said = message if family in ("LORA", "VERA") else ""  # in words of the family's own
            yield pytest.param(family, change, said, id=f"{family} {name}")
    for family, cases in (("LORA", LORA_CASES), ("VERA", VERA_CASES)):
        yield from (pytest.param(family, *case, id=f"{family} {name}") for name, case in cases.items())


# What only the pool asks: which linears a config names.
SERVED = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")


@pytest.mark.parametrize(("family", "change", "message"), [*configs()])
def test_hostile_configs(doors, tmp_path, family, change, message):
    config, tensors = PARTS[family]()
    config |= change
    folder = write(tmp_path / "bad", (config, tensors))
    calls = [*doors.of_folder(folder, family)]
    refuse(doors, [*calls, lambda: doors.pool.add("new", config, tensors)], message)


@pytest.mark.parametrize(
    "key",
    [
        "target_modules",
        *(
            pytest.param(key, marks=pytest.mark.slow)
            for key in ("exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
        ),
    ],
)
@pytest.mark.parametrize("name", REGEX)
def test_hostile_regexes(doors, tmp_path, running, name, key):
    pattern, message = REGEX[name]
    listed = {"target_modules": ["q_proj", "v_proj", LONG], "layers_to_transform": [0, 1]}
    value = {pattern: R} if key in ("rank_pattern", "alpha_pattern") else pattern
    config, tensors = lora_parts()
    config |= (listed if key == "layers_pattern" else {}) | {key: value}
    folder = write(tmp_path / "bad", (config, tensors))
    add = lambda: doors.pool.add("new", config, tensors)
    load = lambda: lrkern.peft.load_adapter(doors.fused, folder)
    replace = lambda: doors.pool.load("lora", folder, replace=True)
    refuse(doors, [add, replace] if key in SERVED else [load, replace], f"{key} {message}", running)


def damaged_header(**changes):
    """Of one float32 tensor [2], where its entry says something else."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return with_header(json.dumps({"a": {k: v for k, v in entry.items() if v != "absent"}}))


def with_header(header, data=bytes(8), count=None):
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if count is None else count) + header + data


def one(key, shape=(2,), dtype="F32", size=4):
    n = 1
    for s in shape:
        n *= s
    return with_header(
        json.dumps({key: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, n * size]}}), bytes(n * size)
    )


GOOD = save({"a": torch.ones(2)})
BYTES = {  # of a safetensors file
    "empty": (b"", "must be safetensors, got 0 bytes"),
    "seven bytes": (GOOD[:7], "must be safetensors, got 7 bytes"),
    "a pickle": (b"\x80\x04}q\x00." * 4, "must be safetensors, got a header of"),
    "a page of a website": (b"<!DOCTYPE html><html>" * 9, "must be safetensors, got a header of"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "must be safetensors"),
    "truncated": (GOOD[:-1], "must hold 8 bytes of tensors, got 7"),
    "longer": (GOOD + b"x", "must hold 8 bytes of tensors, got 9"),
    "header in half": (GOOD[:30], "must be safetensors, got a header of"),
    "header of 2^64 - 1": (
        with_header("{}", count=2**64 - 1),
        "got a header of 18446744073709551615 bytes in a file of",
    ),
    "header of 0": (with_header("", count=0), "its header must be JSON"),
    "header a list": (with_header("[]", b""), "its header must be an object, got list"),
    "header nan": (with_header("nan", b""), "its header must be JSON"),
    "header in UTF-16": (with_header("{}".encode("utf-16"), b""), "its header must be UTF-8, got byte 0xff at 0"),
    "header nested": (with_header('{"a":' * 100_000, b""), "its header is nested too deeply"),
    "header with a key twice": (with_header('{"a":1,"a":2}', b""), "its header 'a' stands there twice"),
    "metadata a number": (with_header('{"__metadata__":{"format":1}}', b""), "its metadata must be strings by name"),
    "an entry a number": (with_header('{"a":1}'), "a must have dtype, shape and data_offsets"),
    "an entry without a shape": (damaged_header(shape="absent"), "a must have dtype, shape and data_offsets"),
    "a dtype a list": (damaged_header(dtype=["F32"]), "a must be of a dtype in F64, .*, got \\['F32'\\]"),
    "float4": (one("a", dtype="F4", size=1), "a must be of a dtype in F64, .*, got 'F4'"),
    "complex": (one("a", dtype="C64", size=8), "a must be of a dtype in F64, .*, got 'C64'"),
    "a shape of floats": (damaged_header(shape=[2.0]), "a must have a shape of up to 8 sizes, got \\[2.0\\]"),
    "a shape of negatives": (damaged_header(shape=[-1, -2]), "a must have a shape of up to 8 sizes"),
    "a shape of 400 digits": (damaged_header(shape=[10**400]), "a must have a shape of up to 8 sizes, got \\[1000"),
    "a shape of 2^80 zeros": (damaged_header(shape=[0, 2**40, 2**40]), "a must have a shape of up to 8 sizes"),
    "a shape of a thousand": (damaged_header(shape=[1] * 1000), "a must have a shape of up to 8 sizes"),
    "a terabyte claimed": (
        damaged_header(shape=[2**38], data_offsets=[0, 2**40]),
        "must hold 1099511627776 bytes of tensors",
    ),
    "offsets that differ from the shape": (damaged_header(data_offsets=[0, 4]), "must have data_offsets 8 bytes apart"),
    "offsets backwards": (damaged_header(data_offsets=[8, 0]), "must have data_offsets 8 bytes apart"),
    "offsets of strings": (damaged_header(data_offsets=["0", "8"]), "must have data_offsets 8 bytes apart"),
    "a hole": (damaged_header(data_offsets=[4, 12]), "a must begin at byte 0"),
    "overlapping": (
        with_header(json.dumps({k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"})),
        "b must begin at byte 8",
    ),
}
KEYS = {"empty": "", "newlines": "a\nb", "escapes": "\x1b[31m\x00", "long": "k" * 1_000_000, "dots": "." * 1_000_000,
        "unicode": "ключ.\u202e", "the prefix": "base_model.model.", "the end": ".lora_A.weight",
        "nobody's": "base_model.model..lora_A.weight", "dots between": f"base_model.model.{'.' * 10**6}.lora_A.weight"}  # fmt: skip
BYTES |= {f"a key of {k}": (one(key), "") for k, key in KEYS.items()}
BYTES |= {f"a tensor of {d}": (one("a", dtype=d, size=n), "") for d, n in (("I64", 8), ("BOOL", 1), ("U8", 1))}
BYTES |= {"a tensor of no size": (one("a", (0, 7)), ""), "a scalar": (one("a", ()), ""), "none": (save({}), "")}


def replaced_by(make):
    """The file of this name with something else in its place."""

    def damage(path):
        path.unlink()
        make(path)

    return damage


def sparse(path, size=1 << 40):
    with path.open("wb") as f:
        f.truncate(size)


def to_null(path):
    path.symlink_to("/dev/zero")


def to_pipe(path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


THINGS = {  # in place of either file
    "a pipe": (replaced_by(os.mkfifo), "must be a file, got a pipe, socket or device"),
    "a link to a pipe": (replaced_by(to_pipe), "must be a file, got a pipe, socket or device"),
    "a link to a device": (replaced_by(to_null), "must be a file, got a pipe, socket or device"),
    "a folder": (
        replaced_by(Path.mkdir),
        "must be a file, got a folder|cannot be read|must be a PEFT folder|must hold|with none",
    ),
    "a link to itself": (replaced_by(lambda p: p.symlink_to(p)), "cannot be read|must be a path|must be a file"),
    "a link to nothing": (replaced_by(lambda p: p.symlink_to(p.with_name("none"))), "cannot be read|nothing there"),
    "a terabyte of zeros": (replaced_by(sparse), "cannot be read: (must have at most|its header must be JSON)"),
    "a file of the system": (replaced_by(lambda p: p.symlink_to("/proc/self/mem")), "cannot be read"),
}
TEXTS = {  # of a config
    "empty": (b"", "must be JSON"),
    "a list": (b"[1]", "must hold an object, got list"),
    "in UTF-16": (json.dumps(lora_parts()[0]).encode("utf-16"), "must be UTF-8, got byte 0xff"),
    "in Latin-1": ('{"a": "é"}'.encode("latin-1"), "must be UTF-8, got byte 0xe9 at 7"),
    "with a byte order mark": (b"\xef\xbb\xbf{}", "must be JSON: .*BOM"),
    "nested": (b"[" * 200_000, "is nested too deeply"),
    "objects nested": (b'{"a":' * 200_000, "is nested too deeply"),
    "5000 digits": (b'{"r": ' + b"9" * 5000 + b"}", "adapter_config.json cannot be read"),
    "r twice": (b'{"r": 4, "r": 40000000}', "'r' stands there twice"),
    "too long": (b'{"r": ' + b" " * (5 << 20) + b"4}", "must have at most 4194304 bytes, got 5242888"),
    "a zero byte": (b'{"r": 4}\x00', "must be JSON"),
}


def folder_damages():
    for name, (data, message) in BYTES.items():
        yield pytest.param(lambda f, d=data: (f / WEIGHTS).write_bytes(d), message, id=f"weights {name}")
    for name, (data, message) in TEXTS.items():
        yield pytest.param(lambda f, d=data: (f / CONFIG).write_bytes(d), message, id=f"config {name}")
    for name, (damage, message) in THINGS.items():
        for file in (CONFIG, WEIGHTS):
            yield pytest.param(lambda f, d=damage, file=file: d(f / file), f"{file} .*({message})", id=f"{file} {name}")


@pytest.mark.parametrize("family", ["LORA", "VERA"])
@pytest.mark.parametrize(("damage", "message"), [*folder_damages()])
def test_hostile_folders(doors, tmp_path, running, family, damage, message):
    folder = write(tmp_path / "bad", PARTS[family]())
    damage(folder)
    refuse(doors, doors.of_folder(folder, family), message, running)


def shards(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00002.safetensors")


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


WHERE = {  # what stands where a folder should
    "nothing": (lambda f: [p.unlink() for p in f.iterdir()] + [f.rmdir()], "must be a PEFT folder, got nothing there"),
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "must hold .*, got an empty folder"),
    "shards": (shards, "must hold adapter_model.safetensors, or shards with .*index.json"),
    "a pickle": (pickled, r"pickle files such as adapter_model.bin are not read\), got .*'adapter_model.bin'"),
    "another folder": (lambda f: (f / WEIGHTS).rename(f / "x"), "must hold adapter_model.safetensors, .*, got .*'x'"),
}  # fmt: skip


@pytest.mark.parametrize("family", ["LORA", "VERA"])
@pytest.mark.parametrize("name", WHERE)
def test_what_is_no_folder_of_pefts(doors, tmp_path, name, family):
    folder = write(tmp_path / "bad", PARTS[family]())
    WHERE[name][0](folder)
    calls = [*doors.of_folder(folder, family)]
    refuse(doors, calls[:3], WHERE[name][1])  # files.load takes what is no folder for a file of lrkern's own


@pytest.mark.parametrize("path", ["org/name-of-the-hub", "", "a\0b", "x" * 5000, None, 7, b"bytes", ["a"]], ids=repr)
def test_paths(doors, path):
    refuse(doors, [*doors.of_folder(path), *doors.of_folder(path, "VERA"), *doors.of_file(path)], "must|cannot be read")


# ---- files of lrkern's own


def own_file(path, edit=None):
    with_layers = model()
    with_layers["layers"][0]["q_proj"] = NOLALinear.from_linear(with_layers["layers"][0]["q_proj"], r=2, k=3, l=3)
    with_layers["layers"][0]["v_proj"] = VeRALinear.from_linear(with_layers["layers"][0]["v_proj"], r=5)
    lrkern.files.save(with_layers, path)
    if edit:
        from safetensors import safe_open

        with safe_open(path, "pt") as f:
            header = json.loads(f.metadata()["lrkern"])
        tensors = load_file(path)
        changed = edit(header, tensors)
        text = changed if isinstance(changed, str) else json.dumps(header)
        save_file(tensors, path, metadata={"lrkern": text})
    return path


def kind(n=0, **changes):
    return lambda h, t: h["kinds"][n].update(changes)


def put(key, value):
    return lambda h, t: h.update({key: value})


def entry(value):
    return lambda h, t: h["layers"].update({"layers.0.q_proj": value})


def many(h, t):
    h["layers"] = {f"l{i}": [0, 1] for i in range(100_000)}


def eight_bits(h, t):
    h["bits"] = 8
    for key in list(t):
        n = t[key].numel()
        t[f"{key}.scale"] = torch.full((-(-n // 64),), 3e38)
        t[key] = torch.full((n,), 127, dtype=torch.int8)


OWN = {
    "format true": (put("format", True), "format must be 1, got True"),
    "format a list": (put("format", [1]), r"format must be 1, got \[1\]"),
    "stream false": (put("stream", False), "stream must be 0, .*, got False"),
    "bits 8.0": (put("bits", 8.0), "bits must be null, 8 or 4, got 8.0"),
    "bits of 400 digits": (put("bits", 10**400), "bits must be null, 8 or 4, got 1000"),
    "scales that overflow": (eight_bits, "must be finite, got inf or nan"),
    "layers a list": (put("layers", ["layers.0.q_proj"]), "must list kinds and layers"),
    "kinds of numbers": (put("kinds", [1, 2]), "kinds: must be objects, got 1"),
    "no kinds": (put("kinds", []), "must be .which of the 0 kinds, seed., got"),
    "a hundred thousand layers": (many, "has l0, which the model does not"),
    "metadata nested": (lambda h, t: "[" * 100_000, "its metadata lrkern is nested too deeply"),
    "metadata twice": (lambda h, t: '{"format":1,"format":1}', "its metadata lrkern 'format' stands there twice"),
    "metadata a number": (lambda h, t: "1", "without the metadata lrkern"),
    "an entry a number": (entry(0), "layers.0.q_proj must be .which of the 2 kinds, seed., got 0"),
    "an entry of three": (entry([0, 1, 2]), "must be .which of the 2 kinds, seed., got"),
    "an index negative": (entry([-1, 1]), "must be .which of the 2 kinds, seed., got"),
    "an index true": (entry([True, 1]), "must be .which of the 2 kinds, seed., got"),
    "a seed of 2^63": (entry([0, 2**63]), "seed must be a whole number in"),
    "a seed a list": (entry([0, [1]]), "seed must be a whole number in"),
    "class a list": (kind(**{"class": ["NOLALinear"]}), "kinds: class must be a layer of lrkern.nn.variants, MissLinear, MoRALinear, NOLALinear, S2FTLinear, VeRALinear or RandLoRALinear, got"),
    "class Linear": (kind(**{"class": "Linear"}), "kinds: class must be a layer of lrkern.nn.variants, MissLinear, .*, got 'Linear'"),
    "in_features 10^12": (kind(in_features=10**12), "in_features and out_features must be sizes of a linear"),
    "sizes of 2^61": (kind(in_features=2**31 - 1, out_features=2**31 - 1), "must be sizes of a linear"),
    "in_features a float": (kind(in_features=16.0), "must be sizes of a linear"),
    "in_features negative": (kind(in_features=-1), "must be sizes of a linear"),
    "another size": (kind(in_features=17), "must be|differs|must have a weight"),
    "r 2^40": (kind(r=2**40), "r must be a whole number in 1..512"),
    "r 2^40 of VeRA": (kind(1, r=2**40), "r must be a whole number in 1"),
    "r 2^31 - 1 of VeRA": (kind(1, r=2**31 - 1), r"vera_lambda_d must be torch.float32 \[2147483647\]"),
    "r a float": (kind(r=2.0), "kinds: r must be a whole number, got 2.0"),
    "k 10^9": (kind(k=10**9), "k must be a whole number in 1..4096"),
    "l null": (kind(l=None), "kinds: l must be a whole number, got None"),
    "alpha 1e39": (kind(lora_alpha=1e39), "kinds: lora_alpha must be a finite number"),
    "alpha of 400 digits": (kind(lora_alpha=10**400), "kinds: lora_alpha must be a finite number"),
    "normalize a word": (kind(normalize="false"), "kinds: normalize must be true or false, got 'false'"),
    "dropout a word": (kind(dropout="no"), "kinds: dropout must be a finite number"),
    "dropout 2": (kind(dropout=2), "dropout must lie in"),
    "distribution a list": (kind(distribution=["sign"]), "kinds: distribution must be a string"),
    "distribution another": (kind(distribution="normal"), "distribution must be one of"),
    "dtype another": (kind(adapter_dtype="int8"), "kinds: adapter_dtype must be one of"),
    "dtype a list": (kind(adapter_dtype=[]), "kinds: adapter_dtype must be one of"),
    "a setting more": (kind(x=1), "kinds: settings must be"),
    "max_in a word": (kind(1, max_in="16"), "kinds: max_in must be a whole number, got '16'"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_hostile_files_of_lrkerns_own(doors, tmp_path, running, name):
    edit, message = OWN[name]
    refuse(doors, doors.of_file(own_file(tmp_path / "own", edit)), message, running)


@pytest.mark.parametrize("name", [*BYTES, *(f"thing {name}" for name in THINGS)])
def test_hostile_bytes_of_lrkerns_own(doors, tmp_path, running, name):
    path = own_file(tmp_path / "own")
    if name in BYTES:
        path.write_bytes(BYTES[name][0])
        message = BYTES[name][1]
    else:
        damage, message = THINGS[name.removeprefix("thing ")]
        damage(path)
    refuse(doors, doors.of_file(path), message, running)
