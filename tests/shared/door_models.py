# SPDX-License-Identifier: Apache-2.0
"""A small model for the one door (lrkern.adapt and what goes with it), and each method in it.

Run as a program it is a process of its own that loads what was saved: one request {folder, out} a line, until stdin ends.
"""

import json
import sys

import torch
from torch import nn

import lrkern
from lrkern.reference.variants import VARIANTS

# Settings that a small layer needs, where the registry of formulas has none for a method.
GIVEN = {
    "bone": {"r": 4}, "dora": {"r": 4}, "lora": {"r": 4}, "miss": {"r": 4}, "mora": {"r": 4, "mora_type": 1},
    "nola": {"r": 4, "k": 6, "l": 7}, "randlora": {"r": 6}, "s2ft": {"index": "1-4,7"}, "vera": {"r": 8},
}  # fmt: skip


def given(method: str) -> dict:
    if method in GIVEN:
        return GIVEN[method]
    of_a_place = ("layers", "projections", "layer", "projection", "before")  # which the door finds
    return {key: value for key, value in VARIANTS[method].settings.items() if key not in of_a_place}


class Net(nn.Module):
    """Linears of sizes that the registry's layers have, one of them the other way round; names that are ends of one another; a head
    that may be saved whole, with a buffer."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.l = nn.Linear(24, 16)
        self.x = nn.ModuleDict({"l": nn.Linear(16, 24), "m": nn.ModuleDict({"l": nn.Linear(24, 16, bias=False)})})
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 5))

    def forward(self, x):
        return self.head(self.x["m"]["l"](self.x["l"](self.l(x).tanh()).tanh()))


class Layered(nn.Module):
    """Two layers of two linears, which methods may chain or share over, and the same head."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        layer = lambda: nn.ModuleDict({"up": nn.Linear(24, 16), "down": nn.Linear(16, 24, bias=False)})
        self.layers = nn.ModuleList([layer(), layer()])
        self.up = nn.Linear(24, 16)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 5))

    def forward(self, x):
        for layer in self.layers:
            x = layer["down"](layer["up"](x).tanh()).tanh()
        return self.head(self.up(x))


LINEARS = ["l", "x.l", "x.m.l"]
# Of Layered, where a method does not take all.
SOME = {"lorta": r"layers\.\d\.up"}
X = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))


def adapted(method: str, seed: int = 0, kind: type[nn.Module] = Net, **more) -> nn.Module:
    """In eval mode, with coefficients and a head that act."""
    net = kind(seed).eval()
    lrkern.adapt(net, method.partition("-")[0], **{"modules_to_save": "head", **given(method), **more})
    change(net)
    return net


@torch.no_grad()
def change(net: nn.Module, by: float = 0.1) -> None:
    """Everything that trains is changed, as training would."""
    g = torch.Generator().manual_seed(5)
    for name, p in net.named_parameters():
        if p.requires_grad:  # RandLoRA's scaling is a hundred
            p.add_(by * (0.05 if "randlora" in name else 1) * torch.randn(p.shape, generator=g).to(p))
    if net.head[0].weight.requires_grad:
        net.head[0].running_mean.add_(0.1)


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        net = Layered().eval()
        try:
            lrkern.load(net, request["folder"])
            with torch.no_grad():
                torch.save(net(X), request["out"])
            print("done", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
