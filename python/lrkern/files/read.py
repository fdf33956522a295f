# SPDX-License-Identifier: Apache-2.0
"""Bytes, JSON and safetensors of files that anybody may have written: bounded in size and time, refused with a ValueError.

The safetensors format is read here and not by its package, since a file must be checked, through the one descriptor that is
then read, before anything is as large as its header says. Tensors are views of the mapped file: what nobody touches takes no
memory.
"""

import gc
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .check import is_whole, named, refusal, require, shown

# Parsing holds the interpreter, at these sizes for a tenth of a second: a pattern or target for each of 20,000 experts, and
# the header of 50,000 tensors.
CONFIG_BYTES = 4 << 20
HEADER_BYTES = 8 << 20
_CONTAINERS = 200_000
_NDIM = 8
_SHARDS = 1000
_SHARD = re.compile(r"(?!\.)[\w.=-]{1,200}\.safetensors")  # a plain name: no way out of the folder
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
FLOAT8 = tuple(dtype for name, dtype in _DTYPES.items() if name.startswith("F8"))


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a file, never of anything else: opening a pipe waits for its writer, a device may do anything."""
    try:
        _check_file(os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    try:
        info = os.fstat(descriptor)
        _check_file(info.st_mode)  # of what was opened: somebody may have put another thing there
        yield descriptor, info.st_size
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    finally:
        os.close(descriptor)


def _check_file(mode: int) -> None:
    require(stat.S_ISREG(mode), f"must be a file, got a {'folder' if stat.S_ISDIR(mode) else 'pipe, socket or device'}")


def _bytes(descriptor: int, count: int, at: int = 0) -> bytes:
    data = os.pread(descriptor, count, at)
    require(len(data) == count, f"must have {count} bytes from {at} on, got {len(data)}")
    return data


def parse(text: bytes | str) -> Any:
    """JSON in UTF-8, no key twice in an object, nesting as deep as Python's parser goes."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"{shown(twice)} stands there twice")
        return found

    try:
        text = text if isinstance(text, str) else text.decode()
        containers = text.count("[") + text.count("{")
        require(containers <= _CONTAINERS, f"must have at most {_CONTAINERS} lists and objects, got {containers}")
        with _uncollected():
            return json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, got byte {text[error.start]:#04x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON: {error}") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Parsing leaves no garbage, but makes so much that the collector would go through all the process has, again and again:
    seconds for a few MB."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def read_json(path: Path, most: int = CONFIG_BYTES) -> Any:
    with opened(path) as (descriptor, size):
        require(size <= most, f"must have at most {most} bytes, got {size}")
        return parse(_bytes(descriptor, size))


def read_tensors(path: Path, most: int = HEADER_BYTES) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, whose header may have so many bytes."""
    with opened(path) as (descriptor, size):
        require(size >= 10, f"must be safetensors, got {size} bytes")
        count = int.from_bytes(_bytes(descriptor, 8), "little")
        require(count <= size - 8, f"must be safetensors, got a header of {count} bytes in a file of {size}")
        require(count <= most, f"must have a header of at most {most} bytes, got {count}")
        with refusal("its header "):
            header = parse(_bytes(descriptor, count, 8))
            require(isinstance(header, dict), f"must be an object, got {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        words = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        require(words, f"its metadata must be strings by name, got {shown(metadata)}")
        parts = {key: _part(key, entry) for key, entry in header.items()}
        end = 0
        for key, (_, _, begin, stop) in sorted(parts.items(), key=lambda item: item[1][2:]):
            require(begin == end, f"{named(key)} must begin at byte {end} of the data, where the one before ends")
            end = stop
        require(end == size - 8 - count, f"must hold {end} bytes of tensors, got {size - 8 - count}")
        with refusal("cannot be mapped: ", of=(OSError, ValueError)):
            data = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    return metadata, {key: _view(data, 8 + count, *part) for key, part in parts.items()}


def read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of the safetensors files that stand beside an index {"weight_map": {key: file}}: each key in its file and no other."""
    with refusal(f"{index.name} "):
        held = read_json(index, HEADER_BYTES)
        where = held.get("weight_map") if isinstance(held, dict) else None
        files = isinstance(where, dict) and where and all(isinstance(file, str) for file in where.values())
        require(files, f"must have a weight_map of files by key, got {shown(where)}")
        shards = sorted(set(where.values()))
        beside = lambda file: _SHARD.fullmatch(file) is not None
        odd = next((file for file in shards if not beside(file)), None)
        require(odd is None, f"must name safetensors files beside it, got {shown(odd)}")
        require(len(shards) <= _SHARDS, f"must name at most {_SHARDS} files, got {len(shards)}")
    tensors, left = {}, HEADER_BYTES  # of all headers together, which take as long to parse as one
    for file in shards:
        with refusal(f"{named(file)} cannot be read: "):
            _, part = read_tensors(index.with_name(file), left)
            left -= index.with_name(file).stat().st_size - sum(t.nbytes for t in part.values())
            for key in part:
                must = f"must hold what {index.name} says it does"
                require(where.get(key) == file, f"{must}, got {named(key)}, which is to be in {shown(where.get(key))}")
        tensors |= part
    if lacking := sorted(where.keys() - tensors.keys()):
        raise ValueError(f"lacks {named(lacking[0])}, which {index.name} says is in {named(where[lacking[0]])}")
    return tensors


def _part(key: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Dtype, shape, begin and end of a tensor, of which the shape fits the bytes."""
    must = "must have dtype, shape and data_offsets"
    require(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, f"{named(key)} {must}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in _DTYPES
    require(known, f"{named(key)} must be of a dtype in {', '.join(_DTYPES)}, got {shown(dtype)}")
    sizes = isinstance(shape, list) and len(shape) <= _NDIM and all(is_whole(n, 0, 2**40) for n in shape)
    # Zero times anything is zero, but torch multiplies the others too.
    sizes = sizes and math.prod(max(n, 1) for n in shape) < 2**59
    require(sizes, f"{named(key)} must have a shape of up to {_NDIM} sizes, got {shown(shape)}")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(is_whole(n, 0, 2**62) for n in offsets)
    bytes_ = math.prod(shape) * _DTYPES[dtype].itemsize
    fits = pair and offsets[1] - offsets[0] == bytes_
    require(fits, f"{named(key)} {dtype} {shape} must have data_offsets {bytes_} bytes apart, got {shown(offsets)}")
    return _DTYPES[dtype], shape, *offsets


def _view(data: mmap.mmap, start: int, dtype: torch.dtype, shape: list[int], begin: int, end: int) -> Tensor:
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    if (start + begin) % dtype.itemsize == 0:
        return torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start + begin).view(shape)
    aligned = bytearray(memoryview(data)[start + begin : start + end])
    return torch.frombuffer(aligned, dtype=dtype).view(shape)
