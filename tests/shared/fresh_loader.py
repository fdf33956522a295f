# SPDX-License-Identifier: Apache-2.0
"""A process of its own that loads adapter files over the original base: one request a line, until stdin ends.

A request is JSON: path and how to load it, seed and dtype of the base, layers as ``adapt`` takes them, out for y and W.
"""

import contextlib
import json
import sys

import torch
from torch import nn

import lrkern.nn

SIZES = {"l": (24, 20), "x.l": (20, 16), "x.head.l": (16, 12)}  # names that are ends of one another


class Net(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(seed)
        self.l = nn.Linear(*SIZES["l"])
        head = nn.ModuleDict({"l": nn.Linear(*SIZES["x.head.l"], bias=False)})
        self.x = nn.ModuleDict({"l": nn.Linear(*SIZES["x.l"]), "head": head})
        self.to(dtype).eval()

    def forward(self, x):
        return self.x["head"]["l"](self.x["l"](self.l(x).tanh()).tanh())


def base(seed: int, dtype: str) -> tuple[Net, torch.Tensor]:
    net = Net(seed, getattr(torch, dtype))
    return net, torch.randn(7, 24).to(getattr(torch, dtype))


def adapt(net: Net, layers: dict[str, dict]) -> Net:
    """Layers by name: the settings, with the class by its name and dtypes by theirs."""
    for name, settings in layers.items():
        settings = dict(settings)
        cls, dtype = getattr(lrkern.nn, settings.pop("class")), settings.pop("adapter_dtype", None)
        parent, _, child = name.rpartition(".")
        layer = cls.from_linear(net.get_submodule(name), **settings, adapter_dtype=dtype and getattr(torch, dtype))
        setattr(net.get_submodule(parent), child, layer.eval())
    return net


def load(how: str, net: Net, x: torch.Tensor, path: str, layers: dict) -> torch.Tensor:
    if how == "peft":
        import peft

        return peft.PeftModel.from_pretrained(net, path)(x)
    if how == "pool":
        from lrkern.serving import AdapterPool, MultiLoraModel

        pool = AdapterPool(net, pages=40)
        pool.load("a", path)
        return MultiLoraModel(net, pool)(x, adapters=["a"] * len(x))
    from lrkern import files

    files.load(adapt(net, layers), path)
    return net(x)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        net, x = base(request["seed"], request["dtype"])
        try:
            with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
                y = load(request["how"], net, x, request["path"], request["layers"])
            torch.save(y, request["out"])
            print("done", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
