# SPDX-License-Identifier: Apache-2.0
"""An S2FT adapter as one safetensors file: ``<linear>.index`` int32 [s] and ``<linear>.change`` float32, and in its metadata, as
``lrkern``, {"format", "kind": "s2ft", "layers": {linear: [side, channels]}}."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files.check import is_whole, named, refusal, require, shown
from ..files.folder import as_path, replaced
from ..files.read import parse, read_tensors
from .adapter import Adapter, Slice, checked

FORMAT = 1


def save(adapter: Adapter, path: str | Path) -> None:
    """Writes the adapter; a reader never meets half a file. Refused with a ValueError: what is no whole adapter."""
    adapter, tensors = checked("lrkern.s2ft.save", adapter), {}
    for name, s in adapter.items():
        tensors[f"{name}.index"] = s.index.to(torch.int32)
        tensors[f"{name}.change"] = s.change.detach().cpu().contiguous().clone()
    layers = {name: [s.side, s.channels] for name, s in adapter.items()}
    header = json.dumps({"format": FORMAT, "kind": "s2ft", "layers": layers}, separators=(",", ":"))
    with refusal("lrkern.s2ft.save: "):
        path = as_path(path)
    with replaced(path) as partial:
        save_file(tensors, partial, metadata={"lrkern": header})


def load(path: str | Path) -> Adapter:
    """Reads what ``save`` wrote, which may be anybody's: the whole file is checked, and refused with a ValueError that names it."""
    with refusal(f"lrkern.s2ft.load: {named(str(path))}: "):
        metadata, tensors = read_tensors(as_path(path))
        header = parse(metadata.get("lrkern", "null"))
        ours = isinstance(header, dict) and header.get("kind") == "s2ft" and isinstance(header.get("layers"), dict)
        require(ours, "must be a file of lrkern.s2ft.save's, got another")
        told = header.get("format")
        require(type(told) is int and told == FORMAT, f"format must be {FORMAT}, got {shown(told)}, another lrkern's")
        adapter: Adapter = {}
        for name, entry in header["layers"].items():
            pair = isinstance(entry, list) and len(entry) == 2 and is_whole(entry[1], 0, 2**31 - 1)
            require(pair, f"{named(name)} must be [side, channels], got {shown(entry)}")
            for key in (f"{name}.index", f"{name}.change"):
                require(key in tensors, f"lacks {named(key)}")
            index, change = tensors.pop(f"{name}.index"), tensors.pop(f"{name}.change")
            require(index.dtype == torch.int32, f"{named(name)}.index must be int32, got {index.dtype}")
            adapter[name] = Slice(entry[0], index.long(), change.clone(), entry[1])  # the file's bytes change with it
        require(not tensors, f"has {', '.join(map(named, sorted(tensors)[:1]))}, which is of no linear")
        return checked("adapter", adapter)
