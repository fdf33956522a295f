# SPDX-License-Identifier: Apache-2.0
"""Adapter files, PEFT models and serving, for ../unchanged.py."""

import importlib
import itertools
import json
import shutil
from pathlib import Path

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lrkern.convert
import lrkern.ops
import lrkern.peft
from lrkern.nn import FusedLoRALinear, NOLALinear, RandLoRALinear, VeRALinear
from lrkern.serving import AdapterPool, MultiLoraModel

from .common import DTYPES, attempt, files_in, rand, shaken, step

# By their old places, which a linter no longer finds.
convert_peft = importlib.import_module("lrkern.convert_peft")
own = importlib.import_module("lrkern.nn.basis_file")

# ---------------------------------------------------------------------------------------------------- files


class Net(nn.Module):
    """in < out, in > out and in = out, one without a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.up, self.down, self.same = nn.Linear(24, 40), nn.Linear(40, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        return self.same(self.down(self.up(x).relu()))


PLACES = "up", "down", "same"
OF_NET = {
    "lora": (FusedLoRALinear, {"r": 4, "lora_alpha": 9}),
    "dora": (FusedLoRALinear, {"r": 4, "use_dora": True, "use_rslora": True}),
    "nola": (NOLALinear, {"r": 4, "k": 70, "l": 65}),
    "vera": (VeRALinear, {"r": 9, "max_in": 40, "max_out": 40, "seed": 6}),
    "randlora": (RandLoRALinear, {"r": 5, "seed": 6}),
    "paper": (RandLoRALinear, {"r": 5, "seed": 6, "paper_pairing": True}),
}


def net_of(*kinds: str, dtype: torch.dtype = torch.float32) -> Net:
    """A layer of a kind at each place, the last one at all that are left."""
    net = Net().to(dtype)
    for i, place in enumerate(PLACES):
        cls, settings = OF_NET[kinds[min(i, len(kinds) - 1)]]
        settings = {"seed": 100 + i} | settings if cls is not FusedLoRALinear else settings
        setattr(net, place, cls.from_linear(getattr(net, place), **settings))
    return shaken(net).eval()


def damages(folder: Path):
    """(what, a damaged copy) of a PEFT folder: entries of the config changed, tensors changed or lost, broken files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    keys = [*list(tensors)[:2], *(k for k in tensors if k.count(".") == 1)]
    off = {
        "bias": "all",
        "use_dora": True,
        "use_rslora": True,
        "lora_bias": True,
        "modules_to_save": ["x"],
        "init_lora_weights": "pissa",
    }
    entries = {
        k: (v, None, -1, 0, 1.5, "x", [1])
        for k, v in {"r": 3, "lora_alpha": 3, "peft_type": "IA3", "projection_prng_key": 9}.items()
        if k in config
    }
    entries |= {k: (v,) for k, v in off.items() if k in config} | {"target_modules": (["up"], "up", ["nowhere"])}
    entries |= {"rank_pattern": ({"up": 3},), "save_projection": (False,)}
    cases = [(f"{k}={v}", config | {k: v}, tensors) for k, vs in entries.items() for v in vs]
    for k in keys:
        changes = {
            "nan": tensors[k] * float("nan"),
            "int": tensors[k].int(),
            "short": tensors[k][1:].clone(),
            "double": tensors[k].double() * 1e200,
        }
        cases += [(f"{k} {what}", config, tensors | {k: t}) for what, t in changes.items()]
        cases += [(f"{k} lost", config, {n: t for n, t in tensors.items() if n != k})]
    cases += [("no tensors", config, {}), ("one more", config, tensors | {"x": torch.ones(1)})]
    cases += [("another layer", config, tensors | {k.replace("up", "nowhere"): t.clone() for k, t in tensors.items()})]
    spoilt = folder.with_name("damaged")
    for what, c, t in cases:
        shutil.rmtree(spoilt, ignore_errors=True)
        spoilt.mkdir()
        (spoilt / "adapter_config.json").write_text(json.dumps(c))
        save_file(t, spoilt / "adapter_model.safetensors", metadata={"format": "pt"})
        yield what, spoilt
    for name, keep in itertools.product(("adapter_config.json", "adapter_model.safetensors"), (None, 0, 0.5, 0.99)):
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(folder, spoilt)
        data = (spoilt / name).read_bytes()
        (spoilt / name).unlink()
        if keep is not None:
            (spoilt / name).write_bytes(data[: int(keep * len(data))])
        yield f"{name} {keep}", spoilt
    yield "nothing there", spoilt / "nowhere"


def damaged_file(path: Path):
    """(what, a damaged copy) of an own file: every entry of its header changed, tensors changed or lost."""
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()["lrkern"])
    tensors, spoilt = load_file(path), path.with_name("damaged file")
    cases = [(f"{k}={v}", header | {k: v}, tensors) for k in header for v in (None, -1, "x", [], {}, 5)]
    cases += [
        (f"kinds.{k}={v}", header | {"kinds": [header["kinds"][0] | {k: v}, *header["kinds"][1:]]}, tensors)
        for k in header["kinds"][0]
        for v in (None, -1, "x", 7)
    ]
    for k, t in tensors.items():
        cases += [
            (f"{k} {what}", header, tensors | {k: new})
            for what, new in (("nan", t * float("nan")), ("short", t[1:].clone()), ("int", t.int()))
        ]
        cases += [(f"{k} lost", header, {n: v for n, v in tensors.items() if n != k})]
    for what, h, t in cases:
        save_file(t, spoilt, metadata={"lrkern": json.dumps(h)})
        yield what, spoilt
    for keep in (0, 0.5):
        spoilt.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        yield f"cut {keep}", spoilt


def files(recording: bool, tmp: Path):
    x = rand(5, 24)
    for kinds in (("nola",), ("vera",), ("randlora",), ("nola", "vera", "paper"), ("lora",), ()):
        net = net_of(*kinds) if kinds else Net()
        name, path = "+".join(kinds) or "none", tmp / "own"
        for bits in (None, 8, 4, 3):
            done = attempt(own.save_adapter, net, path, bits)
            yield f"{name}/own {bits}", done or files_in(path)
            if done is None:
                for other in (Net(), net_of(*kinds)):
                    yield (
                        f"{name}/own {bits}/loaded {type(other.up).__name__}",
                        [str(own.load_adapter(other, path)), repr(other), other(x), other.state_dict()],
                    )
                yield (
                    f"{name}/own {bits}/read",
                    {k: [repr(m), m.state_dict()] for k, m in own.read_layers(path).items()},
                )
        for form in ("to_lora", "to_peft"):
            for what, given in (("model", net), ("by name", dict(net.named_children())), ("layer", net.up)):
                shutil.rmtree(tmp / "out", ignore_errors=True)
                done = attempt(getattr(lrkern.convert, form), given, tmp / "out")
                yield f"{name}/{form} {what}", done or files_in(tmp / "out")
    mixed = tmp / "mixed"
    for bits in (None, 4):
        own.save_adapter(net_of("nola", "vera", "paper"), mixed, bits)
        for what, path in damaged_file(mixed):
            yield f"damaged own {bits}/{what}", attempt(own.load_adapter, Net(), path)
    yield (
        "another model",
        [attempt(own.load_adapter, m, mixed) for m in (nn.Sequential(nn.Linear(3, 3)), net_of("vera"), net_of("lora"))],
    )
    for kind in ("lora", "dora"):
        net, path = net_of(kind), tmp / kind
        lrkern.peft.save_adapter(net, path)
        yield f"peft {kind}", files_in(path)
        other = net_of(kind)
        with torch.no_grad():
            other.up.lora_B.weight.zero_()
        lrkern.peft.load_adapter(other, path)
        yield f"peft {kind}/loaded", [other(x), other.state_dict()]
        for what, spoilt in damages(path):
            yield f"peft {kind}/damaged {what}", attempt(lrkern.peft.load_adapter, other, spoilt)
    yield (
        "peft of nothing",
        [attempt(f, Net(), tmp / "lora") for f in (lrkern.peft.save_adapter, lrkern.peft.load_adapter)],
    )
    one = net_of("lora", "dora")
    yield "peft of both", attempt(lrkern.peft.save_adapter, one, tmp / "both")
    for kind, stored in itertools.product(("vera", "randlora", "sparse", "very_sparse"), (False, True)):
        made, folder = adapted(kind, save_projection=stored), tmp / f"{kind}{stored}"
        made.save_pretrained(folder)
        config = made.peft_config["default"].to_dict()
        shapes = [(24, 40), (40, 16), (16, 16)]
        yield (
            f"draw {kind} {stored}",
            [convert_peft.draw_projections(config, shapes, d) for d in (torch.bfloat16, torch.float16)],
        )
        convert_peft.store_projections(folder, Net(), tmp / "stored")
        yield f"store {kind} {stored}", files_in(tmp / "stored")
        if kind in ("vera", "randlora"):
            for what, spoilt in damages(folder):
                yield (
                    f"store {kind} {stored}/{what}",
                    attempt(convert_peft.store_projections, spoilt, Net(), tmp / "no"),
                )
            for change in (
                {"r": 0},
                {"projection_prng_key": None},
                {"projection_prng_key": 2**64},
                {"peft_type": "LORA"},
            ):
                yield (
                    f"draw {kind} {stored} {change}",
                    attempt(convert_peft.draw_projections, config | change, shapes),
                )
            yield (
                f"draw {kind} {stored} in float32",
                attempt(convert_peft.draw_projections, config, shapes, torch.float32),
            )
    for A, B in ((rand(5, 40), rand(5, 40)), (rand(5, 39), rand(5, 40)), (rand(5, 40), rand(4, 40))):
        for layers in ({"up": ((24, 40), rand(5), rand(40))}, {"up": ((40, 40), rand(5), rand(39))}, {}):
            shutil.rmtree(tmp / "out", ignore_errors=True)
            done = attempt(convert_peft.save_vera, tmp / "out", layers, A, B)
            yield (
                f"save_vera {list(A.shape)} {list(B.shape)} {list(layers.values())[:1] and layers['up'][0]}",
                done or files_in(tmp / "out"),
            )


# ---------------------------------------------------------------------------------------------------- PEFT

CONFIGS = {
    "plain": (peft.LoraConfig, {}),
    "rslora": (peft.LoraConfig, {"use_rslora": True, "rank_pattern": {"up": 7}, "alpha_pattern": {"down": 3}}),
    "dora": (peft.LoraConfig, {"use_dora": True}),
    "dropout": (peft.LoraConfig, {"lora_dropout": 0.3}),
    "dora dropout": (peft.LoraConfig, {"use_dora": True, "lora_dropout": 0.3}),
    "bias": (peft.LoraConfig, {"bias": "all"}),
    "lora_bias": (peft.LoraConfig, {"lora_bias": True}),
    "pissa": (peft.LoraConfig, {"init_lora_weights": "pissa"}),
    "vera": (peft.VeraConfig, {"r": 5}),
    "vera dropout": (peft.VeraConfig, {"r": 5, "vera_dropout": 0.3, "bias": "all"}),
    "randlora": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 1}),
    "sparse": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 1, "sparse": True}),
    "very_sparse": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 1, "very_sparse": True}),
    "randlora dropout": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 1, "randlora_dropout": 0.3}),
}


def config(kind: str, **more):
    make, options = CONFIGS[kind]
    options = {"r": 4, "lora_alpha": 6} | options if make is peft.LoraConfig else options
    return make(**options | {"target_modules": list(PLACES)} | more)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    return shaken(peft.get_peft_model(Net().to(dtype), config(kind, **more))).eval()


def several() -> nn.Module:
    """Three adapters of one patched model."""
    model = peft.get_peft_model(Net(), config("plain"), adapter_name="a")
    model.add_adapter("b", config("rslora"))
    model.add_adapter("c", config("plain", r=33, target_modules=["up"]))
    for i, (_, p) in enumerate((n, p) for n, p in model.named_parameters() if "lora_" in n):
        p.data.copy_(rand(*p.shape, seed=70 + i, std=0.2))
    lrkern.peft.patch(model)
    return model.eval()


def patched(recording: bool):
    for kind, dtype in itertools.product(CONFIGS, DTYPES[:2]):
        model, name = adapted(kind, dtype), f"{kind}/{str(dtype)[6:]}"
        yield f"{name}/before", str(lrkern.peft.report(model))
        yield f"{name}/report", [str(lrkern.peft.patch(model)), repr(model)]
        for T in (1, 6, 40):
            x = rand(T, 24, dtype=dtype)
            yield f"{name}/train {T}", step(model.train(), x)
            yield f"{name}/eval {T}", [step(model.eval(), x), model(x[:, None]), model(x[0])]
        yield f"{name}/autocast", attempt(step, model, x, cast=True)
        with torch.no_grad():
            yield f"{name}/no_grad", [model(x), model(x)]
        yield f"{name}/state", peft.get_peft_model_state_dict(model)
        with model.disable_adapter():
            yield f"{name}/disabled", [model(x), str(lrkern.peft.report(model))]
        yield f"{name}/merge", str(attempt(model.merge_adapter))
        yield f"{name}/merged", [model(x), str(lrkern.peft.report(model))]
        model.unmerge_adapter()
        yield f"{name}/unmerged", model(x)
        lrkern.peft.unpatch(model)
        yield f"{name}/unpatched", [model(x), str(lrkern.peft.report(model))]
    model, x = several(), rand(5, 24)
    for names in (["b", "__base__", "a", "c", "b"], ["a"] * 5, ["__base__"] * 5):
        with torch.no_grad():
            yield f"mixed {names}", [model(x, adapter_names=names), model(x[:, None], adapter_names=names)]
        yield f"mixed {names}/grad", attempt(model, x, adapter_names=names)
    for active in (["a", "b"], ["c"]):
        model.base_model.set_adapter(active)
        yield f"active {active}", [str(lrkern.peft.report(model)), step(model, x)]
    yield "mixed of wrong names", [attempt(several(), x, adapter_names=names) for names in (["a"], ["d"] * 5)]
    for kind in ("plain", "dora"):
        made, net = config(kind), Net()
        lrkern.peft.register(made, net)
        model = shaken(peft.get_peft_model(net, made)).eval()
        yield f"register {kind}", [str(lrkern.peft.report(model)), model(x)]
    yield "refused", [attempt(f, Net()) for f in (lrkern.peft.patch, lrkern.peft.report, lrkern.peft.unpatch)]
    yield (
        "register refused",
        [
            attempt(lrkern.peft.register, *a)
            for a in ((None, Net()), (config("plain"), model), (config("plain"), nn.ReLU()))
        ],
    )
    embedding = peft.get_peft_model(
        nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0", "1"])
    )
    yield "embedding", str(lrkern.peft.patch(embedding))


# ---------------------------------------------------------------------------------------------------- serving


def served(recording: bool, tmp: Path):
    for kind in ("plain", "rslora", "vera", "dora", "randlora"):
        adapted(kind).save_pretrained(tmp / kind)
    for kind in ("nola", "vera", "randlora"):
        own.save_adapter(net_of(kind), tmp / f"own {kind}")
    lrkern.convert.to_peft(net_of("vera"), tmp / "own vera as PEFT")
    x, kinds = rand(6, 3, 24), ("plain", "rslora", "own nola")
    for dtype, vera in itertools.product(DTYPES[:2], ("vera", "own vera")):
        net, name = Net().to(dtype).eval(), f"{str(dtype)[6:]}/{vera}"
        pool = AdapterPool(net, pages=3)
        for kind in (*kinds, vera):
            pool.load(kind, tmp / kind)
        yield (
            f"{name}/pool",
            f"{pool.names} {pool.resident} {pool.layers} {pool.pages} {pool.page_bytes} {len(pool)} {pool.dtype}",
        )
        with MultiLoraModel(net, pool) as model:
            batch = ["plain", None, vera, "own nola", ["plain", vera], vera]
            for scales in (None, [0.5, None, -1.5, 2.0, [0.5, 0.25], 1.0]):
                yield f"{name}/batch {scales}", model(x.to(dtype), adapters=batch, scales=scales)
            yield f"{name}/base", [model(x.to(dtype)), net(x.to(dtype))]
            for kind in (*kinds, vera):
                yield f"{name}/{kind}", [model(x.to(dtype), adapters=[kind] * 6), str(pool.resident)]
            yield (
                f"{name}/too many",
                attempt(model, x.to(dtype), adapters=["plain", "rslora", "own nola", vera, None, None]),
            )
            for wrong in (
                dict(adapters=["plain"]),
                dict(adapters="plain"),
                dict(adapters=[3] * 6),
                dict(adapters=["who"] * 6),
                dict(scales=[1.0] * 6),
                dict(adapters=["plain"] * 6, scales=[1.0]),
                dict(adapters=["plain"] * 6, scales=2.0),
                dict(adapters=["plain"] * 6, scales=[float("nan")] * 6),
                dict(adapters=[["plain", None]] * 6),
            ):
                yield f"{name}/wrong {wrong}", attempt(model, x.to(dtype), **wrong)
            yield f"{name}/rows of nobody", attempt(model, x.to(dtype)[0, 0], adapters=["plain"] * 2)
            for kind in ("dora", "randlora", "own randlora", "own vera as PEFT", "vera", "own vera"):
                yield f"{name}/load {kind}", [str(attempt(pool.load, f"new {kind}", tmp / kind)), str(pool.names)]
            yield (
                f"{name}/replace",
                [
                    str(attempt(pool.load, "plain", tmp / "rslora", replace=True)),
                    model(x.to(dtype), adapters=["plain"] * 6),
                ],
            )
            for method, key in itertools.product(("pin", "unpin", "remove"), ("plain", "rslora", "who", "own nola")):
                yield (
                    f"{name}/{method} {key}",
                    [str(attempt(getattr(pool, method), key)), f"{pool.names} {pool.resident}"],
                )
        yield f"{name}/closed", attempt(model, x.to(dtype), adapters=["plain"] * 6)
    for kind in ("plain", "vera"):
        pool = AdapterPool(Net(), pages=4)
        for what, spoilt in damages(tmp / kind):
            yield f"damaged {kind}/{what}", [str(attempt(pool.load, what, spoilt)), str(pool.names)]
            for key in pool.names:
                pool.remove(key)
        for key in ("", None, 3):
            yield f"{kind} named {key!r}", attempt(pool.load, key, tmp / kind)
    for what, spoilt in damaged_file(tmp / "own nola"):
        yield f"damaged own/{what}", attempt(AdapterPool(Net(), pages=4).load, "a", spoilt)
    for wrong in (
        dict(pages=1, budget=1),
        dict(),
        dict(pages=0),
        dict(budget=3),
        dict(pages=1, max_rank=513),
        dict(pages=1, dtype=torch.float64),
        dict(pages=1, targets=["nothing"]),
        dict(pages=1, parallel={"up": "both"}),
    ):
        yield f"pool {wrong}", str(attempt(AdapterPool, Net(), **wrong))
    yield "pool of PEFT's", str(attempt(AdapterPool, adapted("plain"), pages=1))
    for options in (dict(max_rank=3), dict(targets=["down"]), dict(max_adapters=0)):
        yield f"load into {options}", attempt(AdapterPool(Net(), pages=4, **options).load, "a", tmp / "plain")
    yield "another model", str(attempt(MultiLoraModel, nn.Sequential(nn.Linear(3, 3)), AdapterPool(Net(), pages=1)))
