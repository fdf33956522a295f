# SPDX-License-Identifier: Apache-2.0
"""MiSS as PEFT's files have it: miss_block of each linear, of a kind that init_weights names for all."""

from ..extras import extra
from ..nn import MissLinear
from .check import require, shown
from .folder import PREFIX, READERS, WRITERS, by_linear, check_plain, write_adapter
from .lora_config import targets
from .own import as_layer

# init_weights and our word for it; False is True with other numbers to begin with
_KINDS = {True: "balance", "mini": "mini", "bat": "bat"}


def _read(config, tensors, linears):
    check_plain(config, ("modules_to_save",))
    init = config.get("init_weights")
    kind = _KINDS.get(init or True)
    require(kind, f"init_weights must be true, false, 'mini' or 'bat', got {shown(init)}")
    settings = {"r": config.get("r"), "kind": kind}
    if kind == "mini":  # what PEFT reads for this kind alone, and for all but "bat"
        settings["mini_r"] = 1 if config.get("mini_r") is None else config["mini_r"]
    if kind != "bat":
        settings["dropout"] = config.get("miss_dropout") or 0.0
    return {
        name: as_layer(name, MissLinear, linears[name], settings, {"miss_block": block})
        for name, (block,) in by_linear(config, tensors, linears, "miss_block").items()
    }


def _write(folder, layers, modules):
    with extra("lrkern.files.save"):
        from peft import MissConfig  # here, for those who write other files without PEFT

    first: MissLinear = next(iter(layers.values()))
    init = next(theirs for theirs, ours in _KINDS.items() if ours == first.kind)
    one = {"r": first.r, "mini_r": first.mini_r, "init_weights": init, "miss_dropout": first.dropout}
    config = MissConfig(**one, target_modules=targets(layers, modules), inference_mode=True)
    write_adapter(folder, config, {f"{PREFIX}{name}.miss_block": m.miss_block for name, m in layers.items()})


READERS["MISS"], WRITERS["MISS"] = _read, _write
