# SPDX-License-Identifier: Apache-2.0
"""Makes the recordings beside this file by running the repositories of the papers; README.md says what each one is.

    python record.py MIRRORS SITE [name ...]

MIRRORS has a bare repository OWNER+NAME/repo (or OWNER+NAME.git) of each source. Their code is unpacked at the commit named here into a temporary
folder, imported in a process of its own and called; nothing of it is kept. SITE: a folder with scikit-learn, which LoRA-XS needs, or "".
"""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
I, O, R, TOKENS = 12, 8, 4, (2, 3)
LARGE = {"I": 384, "O": 256, "R": 16}  # sizes at which how parameters start is looked at
STARTS: dict[str, float] = {}  # by name the deviation of a parameter before ``fill``

SOURCES = {  # repository: commit, folders that are unpacked
    "MohammadrezaBanaei/LoRA-XS": ("e50b1a82b5d7b7e87a0c46bc62e07e54f6648d31", "utils"),
    "RaghavSinghal10/lora-sb": ("37b33d4c4c573de20f314bc1231b84ee49771759", "utils"),
    "TracyGuo2001/NLoRA": ("b66f88d7f94d0f8f077edd4a225f2c583d5be5d8", "peft/src"),
    "Godz-z/LoRA-2": ("8b8cfbb7c98419945c7b3c3d933f71199d1912ed", "loralib"),
    "FeiyuZhang98/IncreLoRA": ("51a2d734af7883ef90425206057c1ef25997b359", "loralib"),
    "TsinghuaC3I/SoRA": ("c275ac237b68b888a918cf9dad36d3827e46f616", "src"),
    "gccnlp/BeamLoRA": ("2610c6a33fe64ee153c70d74abe1d7bfd0b68c81", "peft/src"),
    "SKDDJ/LoLDU": ("4fe87a05a668006f55153539cece7fffa91ed91d", "minloldu"),
    "ihounie/lorta": ("fa13dcbd884d0de37aeba73e41104b978182f9cf", "instruction_tuning/lit_gpt", "peft/src"),
    "huawei-noah/Efficient-NLP": ("bb44348bc897779be9357cef8dfd8e397d17ed49", "DyLoRA/loralib"),
    "ChasonShi/MELoRA": ("4ebb8b4f3694ed0d9abd8d5532423fd5172de7ca", "peft-0.5.0/src"),
    "extremebird/Hydra": ("4138457859666d49b9ca9e45473d8570586670bb", "vtab1k"),
    "microsoft/LMOps": ("4f2a9deb5f08e459fd44c2e4792344d78ca89fc3", "reslora/myloralib"),
    "emil2001/RoseLoRA": ("e6b7a73027b69a3b4a4565ba8d48dbbd0bdfa8dc", "src"),
    "aim-uofa/LoRAPrune": ("4da52721b00cd80ef9ec2071d338d60efc7024e7", "loraprune"),
}
RECORDINGS = {}


def recording(repo: str, path: str, what: str):
    """path: where in the repository its packages lie. what: class and call."""

    def register(make):
        RECORDINGS[make.__name__] = (repo, path, what, make)
        return make

    return register


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of float32, as float64: a float32 layer takes them without a rounding."""
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).double()


def linear(seed: int = 1, in_features: int = 0, out_features: int = 0) -> nn.Linear:
    in_features, out_features = in_features or I, out_features or O
    base = nn.Linear(in_features, out_features, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(draw(out_features, in_features, seed=seed, scale=0.5))
        base.bias.copy_(draw(out_features, seed=seed + 100))
    return base.requires_grad_(False)


def fill(named: dict[str, Tensor], seed: int = 7, scale: float = 0.7) -> None:
    """Values that no start has, so that every factor tells."""
    for k, (name, p) in enumerate(named.items()):
        if p.numel() > 1:
            STARTS.setdefault(name.replace(".default", ""), p.detach().std().item())
        p.data = draw(*p.shape, seed=seed + k, scale=scale).to(p.dtype)


def passes(call, xs: dict[str, Tensor], named: dict[str, Tensor], seed: int = 50) -> dict[str, Tensor]:
    """What ``call`` gives at xs, dy, and the gradients of xs and of what is named."""
    y = call(**xs)
    dy = draw(*y.shape, seed=seed).to(y.dtype)
    leaves = xs | named
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return xs | {"y": y, "dy": dy} | {f"grad.{n}": g for n, g in zip(leaves, grads, strict=True)}


def leaf(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(*(shape or (*TOKENS, I)), seed=seed).to(dtype).requires_grad_()


def of(base: nn.Linear, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": base.weight, "bias": base.bias} | {f"param.{n}": p for n, p in named.items()}


def stub(**modules: dict) -> None:
    """Modules of these names (a dot as __) with these attributes, in place of what is not installed and not used."""
    for name, attributes in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(attributes)
        module.__path__ = []
        sys.modules[module.__name__] = module


class Net(nn.Module):
    """block.lin, the names that the repositories look for."""

    def __init__(self, *bases: nn.Linear):
        super().__init__()
        self.block = nn.ModuleDict({"lin" if not k else f"lin{k}": base for k, base in enumerate(bases)})
        self.config, self.device = types.SimpleNamespace(to_dict=dict, model_type="custom"), torch.device("cpu")

    def forward(self, input_ids: Tensor, labels: Tensor):
        return types.SimpleNamespace(loss=(self.block["lin"](input_ids) * labels).sum())


def of_peft(base: nn.Linear, alpha: int, **settings):
    """The layer that the peft on the path makes of it, in float64."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=["lin"], **settings)
    model = peft.get_peft_model(Net(base), config).double()
    return model, config, model.base_model.model.block["lin"]


def xs_config() -> dict:
    how = {"reconstr_mode": "separated", "half_init_dec": False, "replacement_module_random_init": False}
    return how | {"r_squared": True, "svd": {"rank": R, "n_iter": 10, "random_state": 42}}


def xs_factors(layer) -> dict[str, Tensor]:
    return {"lora_A": layer.lora_A.default.weight, "lora_B": layer.lora_B.default.weight}


@recording("MohammadrezaBanaei/LoRA-XS", "", "`find_and_initialize` on a PEFT model, `forward_latent`")
def lora_xs():
    from utils.initialization_utils import find_and_initialize

    base = linear()
    model, config, layer = of_peft(base, alpha=6)
    find_and_initialize(model, {"default": config}, "default", "svd", xs_config(), None)
    latent = layer.default_lora_latent_mapping.double().weight
    fill({"R": latent})
    named = {"R": latent}
    return {"r": R, "lora_alpha": 6}, of(base, named | xs_factors(layer)) | passes(layer, {"x": leaf(2)}, named)


@recording(
    "RaghavSinghal10/lora-sb", "", "`estimate_and_process_grads_torch`, `find_and_initialize_grad`, `forward_latent`"
)
def lora_sb():
    from utils.gradient_utils import estimate_and_process_grads_torch
    from utils.initialization_utils import find_and_initialize_grad

    base = linear()
    batches = [{"input_ids": draw(2, 5, I, seed=20 + k), "labels": draw(2, 5, O, seed=30 + k)} for k in range(2)]
    net, lr = Net(base.requires_grad_()), 0.015625
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in b.items()} for b in batches for i in range(2)], 2)
    grads = estimate_and_process_grads_torch(net, loader, lr, num_samples=4)
    direction = grads["block.lin.weight"]
    model, config, layer = of_peft(base.requires_grad_(False), alpha=R)
    named = {f"base_model.model.{n}": g for n, g in grads.items()}
    find_and_initialize_grad(model, {"default": config}, "default", "svd", xs_config(), None, named)
    latent = layer.default_lora_latent_mapping.weight
    kept = of(base, {"R": latent} | xs_factors(layer)) | {"direction": direction}
    kept |= {f"batch{k}.{n}": v for k, b in enumerate(batches) for n, v in b.items()}
    return {"r": R, "lora_alpha": R, "lr": lr}, kept | passes(layer, {"x": leaf(2)}, {"R": latent})


def middle_of_nlora(init: str, alpha: int, trains: tuple[str, ...], changed: bool):
    base = linear()
    _, _, layer = of_peft(base, alpha, init_lora_weights=init)
    named = {f"lora_{n}": getattr(layer, f"lora_{n}")["default"].weight for n in "ANB"}
    if changed:
        fill(named)
    for name, p in named.items():
        p.requires_grad_(name in trains)
    trained = {n: p for n, p in named.items() if p.requires_grad}
    return {"r": R, "lora_alpha": alpha}, of(base, named) | passes(layer, {"x": leaf(2)}, trained)


@recording("TracyGuo2001/NLoRA", "peft/src", 'its PEFT, `LoraConfig(init_lora_weights="s_lora")`')
def slora():
    return middle_of_nlora("s_lora", 6, ("lora_A", "lora_N", "lora_B"), True)


@recording("TracyGuo2001/NLoRA", "peft/src", 'its PEFT, `LoraConfig(init_lora_weights="n_lora")`, as it starts')
def nlora():
    return middle_of_nlora("n_lora", 6, ("lora_A", "lora_N", "lora_B"), False)


@recording("TracyGuo2001/NLoRA", "peft/src", 'its PEFT, `"n_lora"`, A and B frozen as inttune.py does')
def inttune():
    return middle_of_nlora("n_lora", 6, ("lora_N",), False)


def adopt(layer: nn.Linear, base: nn.Linear):
    layer.double()
    layer.weight.data, layer.bias.data = base.weight.data.clone(), base.bias.data.clone()
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    return layer


@recording("Godz-z/LoRA-2", "loralib", "`loralib.LoRA2.SVDLinear`, training mode")
def lora2():
    from loralib.LoRA2 import SVDLinear

    base = linear()
    layer = adopt(SVDLinear(I, O, r=R, lora_alpha=6, merge_weights=False), base)
    named = {n: p for n, p in layer.named_parameters() if n.startswith("lora_")}
    fill(named)
    return {"r": R, "lora_alpha": 6, "k": 8}, of(base, named) | passes(layer, {"x": leaf(2)}, named)


@recording(
    "FeiyuZhang98/IncreLoRA", "loralib", "`loralib.increlora.SVDLinear`, training mode, `add_reserve_param(2, True)`"
)
def increlora():
    stub(ipdb={"set_trace": breakpoint})
    from loralib.increlora import RankAllocator, SVDLinear

    base = linear()
    layer = adopt(SVDLinear(I, O, r=R, lora_alpha=6, merge_weights=False), base)
    layer.add_reserve_param(2, True)
    named = {n: p for n, p in layer.named_parameters() if n.startswith("lora_")}
    fill(named)
    reserve = [p for n, p in named.items() if n.startswith("lora_E") and not p.requires_grad]
    for e in reserve:
        e.data.fill_(1e-5)
    trained = {n: p for n, p in named.items() if p.requires_grad}
    layer.double()
    tensors = of(base, named) | passes(layer, {"x": leaf(2)}, trained)
    tensors = {n: t.detach().clone() for n, t in (tensors | {"score": layer.score}).items()}
    net = nn.Module()
    net.lin = layer
    allocator = RankAllocator(
        net, R, 0, 0, 1, 1, True, 0.85, 0.85, target_total_rank=2 * R, incre_rank_num=len(reserve)
    )
    allocator.update_ipt(net)
    allocator.increase_to_target_rank(net, mock.Mock())
    for n, p in layer.double().named_parameters():
        if n.startswith("lora_E"):
            p.data = draw(*p.shape, seed=90 + int(n[-1])) if p.requires_grad else p.data
    named = {n: p for n, p in layer.named_parameters() if n.startswith("lora_") and p.requires_grad}
    grown = passes(layer, {"x": leaf(2)}, named) | {f"param.{n}": p for n, p in named.items()}
    return {"r": R, "reserve": len(reserve), "lora_alpha": 6}, tensors | {f"grown.{n}": t for n, t in grown.items()}


@recording("TsinghuaC3I/SoRA", "", "`src.lora.LowRankLinear`, beside W")
def sora():
    nothing = {"get_arg_names": None, "get_arg_names_inside_func": None}
    stub(
        opendelta={"BaseDeltaConfig": object},
        opendelta__utils={},
        opendelta__utils__signature=nothing,
        opendelta__utils__name_based_addressing={"List": list},
        opendelta__basemodel={"DeltaBase": object},
    )
    from src.lora import LowRankLinear

    base = linear()
    layer = LowRankLinear(I, O, base.weight, r=R, lora_alpha=6).double()
    named = dict(layer.named_parameters())
    fill(named)
    return {"r": R, "lora_alpha": 6}, of(base, named) | passes(lambda x: base(x) + layer(x), {"x": leaf(2)}, named)


@recording("gccnlp/BeamLoRA", "peft/src", "its PEFT, `use_beamlora=True`; `analyze_rank_importance` on two layers")
def beamlora():
    bases = [linear(), linear(3)]
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["lin", "lin1"], use_beamlora=True)
    model = peft.get_peft_model(Net(*bases), config).double()
    layers = [model.base_model.model.block[n] for n in ("lin", "lin1")]
    gates = {}
    for k, layer in enumerate(layers):
        named = {n: p for n, p in layer.named_parameters() if n.startswith("lora_")}
        fill(named, seed=7 + 10 * k)
        layer.lora_gate["default"].data.mul_(0.1)
        gates[f"gates.{k}"] = layer.lora_gate["default"].detach().clone()
    with tempfile.TemporaryDirectory() as logs:
        masks, _ = model.base_model.analyze_rank_importance(0.2, cumsum_threshold=0.95, global_step=1, output_path=logs)
    pruned = {f"pruned.{k}": mask for k, mask in enumerate(masks.values())}
    named = {n.replace(".default", ""): p for n, p in layers[0].named_parameters() if n.startswith("lora_")}
    tensors = of(bases[0], named) | gates | pruned | passes(layers[0], {"x": leaf(2)}, named)
    tensors = {n: t.detach().clone() for n, t in tensors.items()}
    model.base_model.cache_state(mock.Mock(state=mock.MagicMock()))
    model.base_model.reset_rank(masks=masks, inherit_param=True)
    tensors |= {f"replaced.{n}": p for n, p in named.items()}
    return {"r": R, "lora_alpha": 6, "temperature": 0.05, "top_p": 0.95}, tensors


@recording("SKDDJ/LoLDU", "", "`add_loldu` on an nn.Linear")
def loldu():
    stub(lightning={"LightningModule": nn.Module})
    from functools import partial

    from minloldu.loldu import LoLDUParametrization, add_loldu

    base = linear().float()  # the only float width it takes, beside 16 bits
    weight = base.weight.detach().clone()
    how = partial(LoLDUParametrization.from_linear, rank=R, lora_alpha=6)
    net = nn.Sequential(base)
    add_loldu(net, {nn.Linear: {"weight": how}})
    x = leaf(2, dtype=torch.float32)
    start = base(x).detach()
    path = base.parametrizations.weight[0]
    named = {n: p for n, p in path.named_parameters() if n in ("lora_A", "lora_B", "P", "vector_z")}
    begun = path.vector_z.detach().clone()
    fill({"vector_z": path.vector_z})
    tensors = {"weight": weight, "bias": base.bias} | {f"param.{n}": p for n, p in named.items()}
    tensors |= {"start.y": start, "start.vector_z": begun}
    return {"r": R, "lora_alpha": 6}, tensors | passes(lambda x: base(x), {"x": x}, {"vector_z": path.vector_z})


@recording(
    "ihounie/lorta",
    "instruction_tuning",
    "lit_gpt: `GPT` of 2 layers of 3 heads, `LoRAQKVLinear` and `LoRALinear` of its layer 1",
)
def lorta():
    available = {"RequirementCache": lambda *_: True}
    stub(
        lightning={},
        lightning__fabric={},
        lightning__fabric__loggers={"CSVLogger": object},
        lightning_utilities={},
        lightning_utilities__core={},
        lightning_utilities__core__imports=available,
        lit_gpt__tokenizer={"Tokenizer": object},
    )
    from lit_gpt.lora import GPT, Config

    width, heads, layers = I, 3, 2
    config = Config(
        block_size=8, padded_vocab_size=16, n_layer=layers, n_head=heads, n_embd=width, r=R, alpha=6, joint_qkvp=True,
        to_query=True, to_key=True, to_value=True, to_projection=True,
    )  # fmt: skip
    model = GPT(config).double()
    named = {n: p for n, p in model.named_parameters() if n.startswith("lora_")}
    fill(named)
    at, made = 1, {}
    wrapped = {"qkv": model.transformer.h[at].attn.attn, "o": model.transformer.h[at].attn.proj}
    for w, m in wrapped.items():
        m.register_forward_pre_hook(lambda m, args, w=w: made.update({w: args[1:]}))
    model(torch.zeros(1, 5, dtype=torch.long))
    tensors = {f"param.{n}": p for n, p in named.items()}
    for k, (w, m) in enumerate(wrapped.items()):
        for name, p in m.linear.named_parameters():
            p.requires_grad_(False)
            p.data = draw(*p.shape, seed=200 + 10 * len(name) + k, scale=0.5)
            tensors[f"{w}.{name}"] = p
        one = passes(lambda x, m=m, w=w: m(x, *made[w]), {"x": leaf(20 + k, 1, 3, width)}, named)
        tensors |= {f"{w}.{n}": t for n, t in one.items()}
    return {"r": R, "lora_alpha": 6, "heads": heads, "layers": layers, "layer": at}, tensors


@recording("ihounie/lorta", "peft/src", "its PEFT, `LorTaConfig` on layers named as Llama's, v_proj of layer 1")
def lorta_fork():
    import peft

    width, heads, layers, at = I, 3, 2, 1
    net, base = nn.Module(), linear(1, width, width)
    about = {"model_type": "llama", "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    net.config = types.SimpleNamespace(**about, to_dict=lambda: about)
    net.model = nn.Module()
    net.model.layers = nn.ModuleList()
    for _ in range(layers):
        block = nn.Module()
        block.self_attn = nn.ModuleDict({f"{n}_proj": linear(2, width, width) for n in "qkvo"})
        net.model.layers.append(block)
    net.model.layers[at].self_attn["v_proj"] = base
    net.forward = lambda x: net.model.layers[at].self_attn["v_proj"](x)
    targets = [f"{n}_proj" for n in "qkvo"]
    model = peft.get_peft_model(net, peft.LorTaConfig(r=R, lora_alpha=6, target_modules=targets)).double()
    named = {n: getattr(net, n) for n in ("lora_A", "lora_B", "lora_C_h", "lora_C_m", "lora_C_l")}
    fill(named)
    settings = {"r": R, "lora_alpha": 6, "heads": heads, "layers": layers, "layer": at, "projection": 2}

    def forward(x: Tensor) -> Tensor:  # as its PeftModelFor... classes call it
        with model._enable_peft_forward_hooks():
            return model.base_model(x)

    return settings, of(base, named) | passes(forward, {"x": leaf(20, 1, 3, width)}, named)


@recording("huawei-noah/Efficient-NLP", "DyLoRA", "`loralib.layers.Linear`, `set_rank(b - 1, frozen)`")
def dylora():
    stub(loralib__utils={})  # which its repository lacks
    from loralib.layers import Linear

    base = linear()
    layer = adopt(Linear(I, O, r=R, lora_alpha=6, merge_weights=False), base)
    named = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    fill(named)
    tensors = of(base, named)
    for b in range(1, R + 1):
        for frozen in (False, True):
            layer.set_rank(b - 1, frozen=frozen)
            layer.train()
            one = passes(layer, {"x": leaf(2)}, named)
            tensors |= {f"{'frozen' if frozen else 'prefix'}{b}.{n}": t for n, t in one.items() if n not in ("x", "dy")}
    return {"r": R, "lora_alpha": 6}, tensors | {"x": one["x"], "dy": one["dy"]}


@recording("ChasonShi/MELoRA", "peft-0.5.0/src", "its PEFT 0.5, `melora.Linear`, two blocks of rank 2")
def melora():
    from peft.tuners.melora import Linear

    base, n, r = linear(), 2, 2
    layer = adopt(Linear("default", I, O, r=[r] * n, lora_alpha=[6] * n), base)
    named = {x: p for x, p in layer.named_parameters() if x.startswith("lora_")}
    fill(named)
    return {"n": n, "r": r, "lora_alpha": 6}, of(base, named) | passes(layer, {"x": leaf(2)}, named)


def hydra_of(trained: tuple[str, ...]):
    """Of the branches' parameters those that end so are changed and train; the others stay zero."""
    stub(timm={})
    from hydra import Hydra_layer, forward_vit_hydra_ffn, reparameterize

    base, scale = linear(), 0.75
    block = nn.Module()
    block.fc1 = block.act = block.drop1 = block.drop2 = nn.Identity()
    block.fc2 = base
    block.hydra_mlp_par = Hydra_layer(I, R, O, scale=scale).double()
    block.hydra_mlp_seq = Hydra_layer(O, R, O, scale=scale).double()
    named = {n: p for n, p in block.named_parameters() if n.startswith("hydra") and n.endswith(trained)}
    fill(named)
    tensors = of(base, named) | passes(lambda x: forward_vit_hydra_ffn(block, x), {"x": leaf(2)}, named)
    branches = block.hydra_mlp_par, block.hydra_mlp_seq
    par, seq = (m.down_proj.weight.T @ m.up_proj.weight.T for m in branches)
    of_par, of_seq = (m.down_proj.bias @ m.up_proj.weight.T + m.up_proj.bias for m in branches)
    weight, bias = reparameterize(base.weight.T, base.bias, par, of_par, seq, of_seq, scale)
    return {"r": R, "scale": scale}, tensors | {"merged.weight": weight, "merged.bias": bias}


@recording(
    "extremebird/Hydra",
    "vtab1k",
    "`forward_vit_hydra_ffn` with fc2 = W, `Hydra_layer` with biases of zero; `reparameterize`",
)
def hydra():
    return hydra_of(("weight",))


@recording("extremebird/Hydra", "vtab1k", "the same, biases changed too")
def hydra_bias():
    return hydra_of(("weight", "bias"))


def chain(mode: int, name: str, earlier: int, square: bool = False):
    """Three layers in a chain, each with an x of its own; y and gradients of the second and third, which read the ones before."""
    from myloralib.config import ResLoraConfig
    from myloralib.layers import ResLoraLinear

    config = ResLoraConfig(
        rank=R, lora_alpha=6, lora_dropout=0.0, start_index=0, lora_num=1, res_flag=mode, pre_num=earlier
    )
    bases = [linear(k + 1) for k in range(3)]
    layers = [ResLoraLinear(b, config, f"{k}").double().train() for k, b in enumerate(bases)]
    layers[1].pre_lora, layers[2].pre_lora = layers[0], layers[1]
    named = {}
    for k, layer in enumerate(layers):
        named |= {f"{k}.{n}": p for n, p in layer.loras[0].named_parameters()}
    fill(named)
    xs = [leaf(20 + k) for k in range(3)]
    ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    tensors = {f"param.{n}": p for n, p in named.items()}
    loss = 0
    for k in range(3):
        tensors |= {f"{k}.weight": bases[k].weight, f"{k}.bias": bases[k].bias, f"{k}.x": xs[k], f"{k}.y": ys[k]}
        if k:
            tensors[f"{k}.dy"] = draw(*ys[k].shape, seed=50 + k)
            loss = loss + (ys[k] * tensors[f"{k}.dy"]).sum()
    leaves = {f"{k}.x": x for k, x in enumerate(xs)} | named
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    tensors |= {f"grad.{n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {"r": R, "lora_alpha": 6, "mode": name, "pre_num": earlier}, tensors


@recording("microsoft/LMOps", "reslora", "`myloralib.layers.ResLoraLinear`, three in a chain, `res_flag=1`")
def reslora_is():
    return chain(1, "is", 1)


@recording("microsoft/LMOps", "reslora", "the same with `res_flag=2`")
def reslora_bs():
    return chain(2, "bs", 2)


@recording("microsoft/LMOps", "reslora", "the same with `res_flag=3`")
def reslora_ms():
    return chain(3, "ms", 2)


@recording("emil2001/RoseLoRA", "", "`SparseSVDLinear`: forward, then two rounds of backward and `apply_sparsity`")
def roselora():
    stub(matplotlib={}, matplotlib__pyplot={})
    import peft
    from src.rose_lora import SparseSVDLinear

    base, config = linear(), peft.LoraConfig(r=R, lora_alpha=6)
    layer = SparseSVDLinear(base, "default", r=R, lora_alpha=6, config=config).double()
    named = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    fill(named)
    x = leaf(2)
    tensors = of(base, {n: p.detach().clone() for n, p in named.items()}) | passes(layer, {"x": x}, named)
    for step, tau in enumerate((0.75, 0.5)):
        for p in named.values():
            p.grad = None
        dy = draw(*TOKENS, O, seed=60 + step)
        layer(x).backward(dy)
        layer.apply_sparsity(tau)
        tensors |= {f"step{step}.dy": dy, f"step{step}.sensitivity_A": layer.sensitivity_A.clone()}
        tensors |= {f"step{step}.sensitivity_B": layer.sensitivity_B.clone()}
        tensors |= {f"step{step}.{n}": p.detach().clone() for n, p in named.items()}
    return {"r": R, "lora_alpha": 6, "beta": 0.8, "taus": [0.75, 0.5]}, tensors


@recording("aim-uofa/LoRAPrune", "", "`loraprune.lora.Linear` with a mask; `compute_sensitivity`")
def loraprune():
    from loraprune import lora

    lora.Linear8bitLt = lora.Linear  # there where bitsandbytes is
    from loraprune import utils

    base = linear()
    layer = adopt(lora.Linear(I, O, r=R, lora_alpha=6, merge_weights=False), base)
    named = {"lora_A": layer.lora_A.weight, "lora_B": layer.lora_B.weight}
    fill(named)
    layer.lora_mask.data = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0], dtype=torch.float64).repeat(O // 8)
    tensors = of(base, named) | {"mask": layer.lora_mask} | passes(layer, {"x": leaf(2)}, named)
    for name, p in named.items():
        p.grad = tensors[f"grad.{name}"]
    utils.NUM_ATTENTION_HEADS = heads = 2
    for name, attention, transpose in (("rows", False, False), ("columns", False, True), ("heads", True, False)):
        tensors[f"score.{name}"] = utils.compute_sensitivity(layer, attention, "lora", transpose)
        tensors[f"raw.{name}"] = utils.compute_sensitivity(layer, attention, "lora", transpose, norm=False)
    return {"r": R, "lora_alpha": 6, "heads": heads}, tensors


def one(name: str, mirrors: Path, site: str) -> None:
    repo, path, what, make = RECORDINGS[name]
    commit, *folders = SOURCES[repo]
    bare = next(
        p for p in (mirrors / repo.replace("/", "+") / "repo", mirrors / f"{repo.replace('/', '+')}.git") if p.exists()
    )
    with tempfile.TemporaryDirectory() as tmp:
        archive = ["git", f"--git-dir={bare}", "archive", commit, *folders]
        subprocess.run(
            ["tar", "x", "-C", tmp], input=subprocess.run(archive, check=True, capture_output=True).stdout, check=True
        )
        sys.path[:0] = [str(Path(tmp) / path)]
        sys.path += [site] if site else []
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            with mock.patch.dict(globals(), LARGE):
                make()
            starts = dict(STARTS)
            torch.manual_seed(0)
            settings, tensors = make()
    tensors = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
    metadata = {"repo": repo, "commit": commit, "what": what}
    metadata |= {"settings": json.dumps(settings), "starts": json.dumps(starts)}
    save_file(tensors, HERE / f"{name}.safetensors", metadata)
    print(name, (HERE / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    mirrors, site, *names = sys.argv[1:]
    if len(names) == 1:
        one(names[0], Path(mirrors), site)
    else:
        for name in names or RECORDINGS:
            subprocess.run([sys.executable, __file__, mirrors, site, name], check=True)
