# SPDX-License-Identifier: Apache-2.0
"""Makes compress.json: what the authors' code of WeLore, PELA, TRP and Maestro computes of small matrices.

    python tests/recorded/compress.py FOLDER     FOLDER has checkouts welore, PELA, Trained-Rank-Pruning, Maestro-LoD at COMMITS

Only their functions are run, each out of its file, as their imports need a GPU, data sets or old packages.
"""

import ast
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

COMMITS = {
    "welore": "VITA-Group/welore f69f015",
    "PELA": "guoyang9/PELA e0d3e1f",
    "Trained-Rank-Pruning": "yuhuixu1993/Trained-Rank-Pruning 8cc7470",
    "Maestro-LoD": "SamuelHorvath/Maestro-LoD 0003014",
}


def taken(path: Path, *names: str) -> types.SimpleNamespace:
    """Functions and classes of a file, without the rest of it."""
    text = path.read_text().replace("async=True", "non_blocking=True")  # of Python 3.6
    body = [node for node in ast.parse(text).body if getattr(node, "name", None) in names]
    space = {"torch": torch, "nn": nn, "np": np, "F": nn.functional, "norm": torch.norm, "Module": nn.Module}
    space |= {"Tensor": torch.Tensor, "Parameter": nn.Parameter, "check_layer": lambda layer, p: p}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def welore(root: Path) -> dict:
    theirs = taken(root / "utils.py", "adaptive_rank_pruning")
    spectra = [torch.linalg.svdvals(randn(7, 5 + i, seed=i) * torch.linspace(1, 0.1, 5 + i)) for i in range(3)]
    log = types.SimpleNamespace(info=lambda text: None)
    found = {}
    for tau in (0.1, 0.3, 0.6):
        cut = theirs.adaptive_rank_pruning(
            types.SimpleNamespace(rank_thresold=tau), tau, [{"w": s} for s in spectra], log
        )
        found[str(tau)] = [len(s) - int(cut[i]["w"]) for i, s in enumerate(spectra)]
    return {"spectra": [s.tolist() for s in spectra], "ranks": found}


def pela(root: Path) -> dict:
    theirs = taken(root / "ALBEF/models/low_rank.py", "low_rank_approximate")
    losses = taken(root / "ALBEF/models/model_pretrain.py", "inf_norm")
    w = [randn(12, 9, seed=0), randn(8, 12, seed=1)]
    ranks = [(t.shape[0] * t.shape[1]) // (2 * (t.shape[0] + t.shape[1])) for t in w]
    teacher, student = nn.ModuleDict(), nn.ModuleDict()
    products = []
    for name, t, r in zip("uv", w, ranks, strict=True):
        out = theirs.low_rank_approximate(t.T, r)
        teacher[name] = nn.Linear(t.shape[1], t.shape[0], bias=False)
        teacher[name].weight.data = t
        student[name] = nn.Sequential(nn.Linear(t.shape[1], r, bias=False), nn.Linear(r, t.shape[0], bias=False))
        student[name][0].weight.data = out["mat_l"].T.float()
        student[name][1].weight.data = out["mat_r"].float()
        products.append((out["mat_r"] @ out["mat_l"].T).tolist())
    loss = losses.inf_norm(teacher, student)
    loss.backward()
    kept = {}
    for name, pair in student.items():
        a, b = (part.weight for part in pair)
        kept[name] = {key: t.tolist() for key, t in {"A": a, "B": b, "dA": a.grad, "dB": b.grad}.items()}
    w = dict(zip("uv", (t.tolist() for t in w), strict=True))
    return {"W": w, "ranks": ranks, "products": products, "loss": loss.item(), "student": kept}


def trp(root: Path) -> dict:
    theirs = taken(root / "decompose.py", "EnergyThreshold")
    approx = taken(root / "cifar-TRP.py", "low_rank_approx").low_rank_approx
    found = []
    for energy in (0.5, 0.9):
        model = nn.ModuleDict({"c": nn.Conv2d(6, 8, 1, bias=False)})
        w = randn(8, 6, seed=4) * torch.linspace(1, 0.1, 6)
        model["c"].weight.data = w[:, :, None, None].clone()
        _, sub = approx(model, ["c"], theirs.EnergyThreshold(energy), True, "NC")
        after = model["c"].weight.detach()[:, :, 0, 0]
        k = theirs.EnergyThreshold(energy)(torch.linalg.svdvals(w))
        found.append(
            {"energy": energy, "k": k, "W": w.tolist(), "T": after.tolist(), "sub": sub["c"][:, :, 0, 0].tolist()}
        )
    return {"cases": found}


def maestro(root: Path) -> dict:
    theirs = taken(root / "maestro/layers/linear.py", "MaestroLinear", "decompose_linear")
    dense = nn.Linear(7, 5)
    dense.weight.data, dense.bias.data = randn(5, 7, seed=6), randn(5, seed=7)
    layer, x = theirs.decompose_linear(dense), randn(3, 7, seed=8)
    a, b = layer.in_network.weight, layer.out_network.weight
    outputs = {str(n): layer(x, n / 5).detach().tolist() for n in (1, 3, 5)}
    found = {"A": a.tolist(), "B": b.tolist(), "bias": dense.bias.tolist(), "x": x.tolist(), "y": outputs}
    for hierarchical in (False, True):
        loss = layer.group_lasso(hierarchical=hierarchical).sum()
        grads = torch.autograd.grad(loss, (a, b))
        importance = layer.importance(hierarchical=hierarchical)
        threshold = importance.sort().values[1].item() * 1.01
        pruned = theirs.decompose_linear(dense)
        pruned.assign_low_rank(threshold, prune=True, hierarchical=hierarchical)
        found["hierarchical" if hierarchical else "alone"] = {
            "lasso": loss.item(), "dA": grads[0].tolist(), "dB": grads[1].tolist(), "importance": importance.tolist(),
            "threshold": threshold, "A": pruned.in_network.weight.tolist(), "y": pruned(x).detach().tolist(),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    made = {name: fn(folder / name) for name, fn in zip(COMMITS, (welore, pela, trp, maestro), strict=True)}
    rounded = json.loads(json.dumps(made), parse_float=lambda text: float(f"{float(text):.7g}"))
    text = json.dumps({"commits": COMMITS, **rounded}, separators=(",", ":"))
    Path(__file__).with_suffix(".json").write_text(text.replace('},"', '},\n"') + "\n")
