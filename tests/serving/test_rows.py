# SPDX-License-Identifier: Apache-2.0
"""Whose rows are whose: every output is that of stock PEFT for the request alone, or the call is refused. Sizes are drawn so
that wrong counts coincide: as many tokens, images or experts' tokens as requests."""

import random

import pytest
import torch
from tiny_models import MODELS, V, adapt, parts, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrkern.serving import AdapterPool, MultiLoraModel
from lrkern.serving.rows import Along, Follow, Owners

REFUSED = "whose rows do not tell which of the"
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "whisper": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "xlnet": ["layer_1", "layer_2"],
    "longt5": ["q", "k", "v", "o", "wi", "wo"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "qwen2_moe": r".*(self_attn\.[qkvo]_proj|shared_expert\.(gate|up|down)_proj)",
    "llava": r".*language_model.*(q|k|v|o|gate|up|down)_proj",
}
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Case:
    """A model with two adapters in a pool, and stock PEFT beside it."""

    def __init__(self, model, targets, **options):
        self.model, self.alone = model, {None: model}
        self.pool = AdapterPool(model, pages=4, targets=targets, **options)
        for seed, name in enumerate("ab"):
            self.alone[name] = adapt(model, seed, targets)
            self.pool.add(name, *parts(self.alone[name]))
        self.served = MultiLoraModel(model, self.pool)

    def check(self, inputs, who, each, refused=False):
        """inputs: of the batch; each(i): of request i alone. Whether it was served."""
        try:
            got = _out(self.served(**inputs, adapters=who))
        except ValueError as error:
            assert REFUSED in str(error), error
            assert refused, f"{who}: {error}"
            return False
        for i, name in enumerate(who):
            with torch.no_grad():
                want = _out(self.alone[name](**each(i)))
            torch.testing.assert_close(
                got[i : i + 1], want, atol=2e-5, rtol=1e-4, msg=lambda m, i=i: f"{i} of {who}: {m}"
            )
        return True


def _out(result):
    return result if isinstance(result, torch.Tensor) else result.logits if "logits" in result else result[0]


def draw(seed):
    print("seed", seed)  # shown where a test fails
    torch.manual_seed(seed)
    return random.Random(seed)


def requests(rng, most=4):
    """At least two that differ: all the same would be one."""
    who = [rng.choice([None, "a", "b"]) for _ in range(rng.randint(2, most))]
    who[rng.randrange(len(who))] = next(n for n in ("a", "b", None) if n != who[0]) if len({*who}) == 1 else who[0]
    return who if len({*who}) > 1 else [*who[:-1], "a" if who[0] != "a" else "b"]


def text(rng, kind, B):
    """Inputs, and those of one request. As many tokens as requests in a third of the cases."""
    S = B if rng.random() < 0.3 else rng.randint(1, 6)
    if kind == "whisper":
        inputs = {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": torch.randint(3, V - 1, (B, S))}
    else:
        inputs = {"input_ids": torch.randint(3, V - 1, (B, S))}
        if kind in ("t5", "bart", "longt5"):
            inputs["decoder_input_ids"] = torch.randint(3, V - 1, (B, rng.randint(1, 4)))
        if rng.random() < 0.5:
            inputs["attention_mask"] = torch.ones(B, S, dtype=torch.int64)
    return inputs, lambda i: {k: t[i : i + 1] for k, t in inputs.items()}


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "llava"])
def test_transformers_models(kind):
    """Forwards of many shapes on one model: what was followed once is known in the next."""
    case = Case(tiny(kind), TARGETS.get(kind, DECODER))
    for seed in range(12):
        rng = draw(seed)
        who = requests(rng)
        assert case.check(*(parts := text(rng, kind, len(who)))[:1], who, parts[1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5", "bart", "whisper", "opt", "qwen2_moe"])
def test_generate(kind, options):
    case = Case(tiny(kind), TARGETS.get(kind, DECODER))
    for seed in range(2):
        rng = draw(seed)
        who = requests(rng, 3)
        inputs, each = text(rng, kind, len(who))
        for given in (inputs, per := [each(i) for i in range(len(who))]):
            for one in given if isinstance(given, list) else [given]:
                one.pop("decoder_input_ids", None)
                if "input_ids" in one:
                    one["attention_mask"] = torch.ones_like(one["input_ids"])
        more = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0) | options
        if kind == "whisper" and "num_return_sequences" in options:  # it repeats its inputs before the encoder
            with pytest.raises(ValueError, match="input_features must have a row for each"):
                case.served.generate(**inputs, adapters=who, **more)
            continue
        got = case.served.generate(**inputs, adapters=who, **more).unflatten(0, (len(who), -1))
        for i, name in enumerate(who):
            assert torch.equal(got[i], case.alone[name].generate(**per[i], **more)), (i, who)


def images(rng, B):
    """In each request up to two images of four patches, and often as many images in all as requests."""
    counts = [rng.randint(0, 2) for _ in range(B)]
    if rng.random() < 0.6:
        counts = [0] * B
        counts[rng.randrange(B)] = B if B < 3 else 2
        counts[rng.randrange(B)] += B - sum(counts)
    S = max(4 * max(counts), 1) + rng.randint(1, 3)
    ids = torch.randint(3, V - 1, (B, S))
    for row, n in zip(ids, counts, strict=True):
        row[torch.randperm(S)[: 4 * n]] = V - 1
    pixels = [torch.randn(n, 3, 8, 8) for n in counts]
    put = lambda ids, p: {"input_ids": ids} | ({"pixel_values": p} if len(p) else {})
    return put(ids, torch.cat(pixels)), lambda i: put(ids[i : i + 1], pixels[i])


def test_llava_without_its_tower():
    case = Case(tiny("llava"), TARGETS["llava"])
    for seed in range(12):
        rng = draw(seed)
        who = requests(rng)
        inputs, each = images(rng, len(who))
        assert case.check(inputs, who, each)


def test_a_tower_over_images_is_refused():
    """Two images of one request and none of the other's were taken for one of each, off by 0.5."""
    case, served = Case(tiny("llava"), r".*(vision_tower|language_model).*(q|k|v|out|o)_proj"), 0
    for seed in range(12):
        rng = draw(seed)
        who = requests(rng)
        served += case.check(*(parts := images(rng, len(who)))[:1], who, parts[1], refused="pixel_values" in parts[0])
    inputs, each = images(random.Random(1), 3)
    assert case.check(inputs, ["a"] * 3, each), "requests that want the same may have their rows anywhere"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_no_layer_waits_for_the_device(kind):
    """A value that goes to Python is what CUDA is waited for; served, a model reads none beyond its own."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.append(func) if str(func) in READ else None
            return func(*args, **kwargs or {})

    case, (inputs, _) = Case(tiny(kind), TARGETS.get(kind, DECODER)), text(random.Random(3), kind, 3)
    counts = []
    for call in (case.model, lambda **kw: case.served(**kw, adapters=["a", None, "b"])):
        for _ in range(2):  # followed, and known
            reads = []
            with torch.no_grad(), Reads():
                call(**inputs)
            counts.append(len(reads))
    assert len({*counts}) == 1, counts


READ = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten.equal.default",
}


# ---- the rules


def divided(rng, n):
    """Random sizes whose product is n."""
    sizes = []
    while n > 1:
        sizes.append(rng.choice([k for k in range(2, n + 1) if n % k == 0]))
        n //= sizes[-1]
    for _ in range(rng.randint(0, 2)):
        sizes.insert(rng.randint(0, len(sizes)), 1)
    return sizes or [1]


def changes(rng, t):
    """Functions of many kinds that only move elements, with random arguments."""
    n, d, e = t.ndim, rng.randrange(t.ndim), rng.randrange(t.ndim)
    size, order = t.shape[d], rng.sample(range(n), n)
    cut = slice(rng.randrange(size), None, rng.randint(1, 2))
    index = torch.tensor([rng.randrange(size) for _ in range(size)])
    place = tuple(slice(None) for _ in range(d))
    other = torch.zeros_like(t) if rng.random() < 0.5 else torch.zeros(t.shape[-1])
    put = torch.zeros(t.shape, dtype=t.dtype)
    return {
        "reshape": lambda: t.reshape(divided(rng, t.numel())), "flatten": lambda: t.flatten(min(d, e), max(d, e)),
        "unsqueeze": lambda: t.unsqueeze(d), "squeeze": lambda: t.squeeze(), "transpose": lambda: t.transpose(d, e),
        "permute": lambda: t.permute(order), "permute *": lambda: torch.permute(t, dims=tuple(order)),
        "movedim": lambda: t.movedim(d, e), "mT": lambda: t.mT if n > 1 else t, "T": lambda: t.T if n == 2 else t,
        "expand": lambda: t.expand(2, *t.shape), "repeat": lambda: t.repeat(*(2 if i == d else 1 for i in range(n))),
        "repeat more": lambda: t.repeat(2, *[1] * n), "repeat_interleave": lambda: t.repeat_interleave(2, d),
        "[...]": lambda: t[(*place, cut)], "[..., i]": lambda: t[(*place, size - 1)], "[None]": lambda: t[..., None, :],
        "[index]": lambda: t[(*place, index)], "index_select": lambda: t.index_select(d, index),
        "narrow": lambda: t.narrow(d, 0, max(1, size - 1)), "select": lambda: t.select(d, 0),
        "split": lambda: t.split(max(1, size // 2), d)[0], "chunk": lambda: torch.chunk(t, 2, dim=d)[-1],
        "unbind": lambda: t.unbind(d)[0], "cat": lambda: torch.cat([t, t], d), "stack": lambda: torch.stack([t, t], d),
        "flip": lambda: t.flip(d), "roll": lambda: torch.roll(t, 1, dims=d), "sort": lambda: t.sort(d, True)[0],
        "add": lambda: t + other, "radd": lambda: 0 + t, "iadd": lambda: t.clone().add_(0), "mul": lambda: t.mul(1),
        "amax": lambda: t.amax(d, keepdim=True), "max": lambda: t.max(d)[0], "mean": lambda: t.float().mean(d).to(t.dtype),
        "clone": lambda: t.clone(), "contiguous": lambda: t.contiguous(), "where": lambda: torch.where(t < -1, other, t),
        "gather": lambda: t.gather(d, torch.zeros_like(t, dtype=torch.int64)), "tril": lambda: t.unsqueeze(0).tril(999),
        "pad": lambda: nn.functional.pad(t, (0, 1)), "setitem": lambda: (put.__setitem__((*place, slice(None)), t), put)[1],
        "setitem part": lambda: (put.__setitem__((*place, slice(1, None)), t[(*place, slice(1, None))]), put)[1],
        "copy": lambda: put.copy_(t), "einsum": lambda: torch.einsum("ab->ba", t) if n == 2 else t,
        "matmul": lambda: t @ torch.eye(t.shape[-1], dtype=t.dtype) if n > 1 else t,
    }  # fmt: skip


def test_what_a_rule_says_is_true():
    """Elements hold their request plus one; functions move them about, and what is known of the result is so in every element."""
    said = total = 0
    for seed in range(1500):
        rng = draw(seed)
        B, inner = rng.randint(2, 4), rng.randint(1, 2)
        owners = Owners(B)
        lead = [rng.randint(1, 4) for _ in range(rng.randint(0, 2))]
        x = (
            torch.arange(1, B + 1)
            .repeat_interleave(inner)
            .view(-1, *[1] * len(lead))
            .expand(-1, *lead)
            .clone()
            .double()
        )
        follow, trail = Follow([(x, {0: Along(1, owners, inner)})]), []
        with follow:
            for _ in range(rng.randint(1, 5)):
                if not x.ndim or x.numel() > 4096:
                    break
                name = rng.choice(sorted(changes(rng, x)))
                x = changes(rng, x)[name]()
                trail.append(name)
        known = follow.known(x)
        total += 1
        for d, along in known.items() if isinstance(known, dict) else ():
            said += 1
            want = along.spread(torch.arange(B)).view(-1, *[1] * (x.ndim - 1 - d)).expand(x.shape)
            assert torch.equal(x[x != 0], 1.0 + want[x != 0]), (trail, d, along)  # padding is nobody's
    assert said > total / 3, f"{said} of {total}"


# ---- models of one's own, that move rows about


class Moving(nn.Module):
    """Embeds, moves rows, an adapted linear, moves them back; a request's output depends on its own input alone."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.linear, self.order = nn.Embedding(V, 16), nn.Linear(16, 16), None

    def forward(self, ids, **kwargs):
        h = self.embed(ids)
        return h + self.moved(h, ids)


def moving(moved):
    return type(moved.__name__, (Moving,), {"moved": moved})


@moving
def LengthFirst(self, h, ids):
    return self.linear(h.transpose(0, 1)).transpose(0, 1)


@moving
def Flattened(self, h, ids):
    return self.linear(h.reshape(-1, 16)).view_as(h)


@moving
def Heads(self, h, ids):
    return self.linear(h.unflatten(-1, (4, 4)).permute(2, 0, 1, 3).flatten(2).repeat(1, 1, 4)[..., :16]).mean(0)[
        :, None
    ]


@moving
def Doubled(self, h, ids):
    return self.linear(h.repeat_interleave(2, 0))[::2] + self.linear(h.repeat(2, 1, 1))[len(h) :]


@moving
def Folded(self, h, ids):
    return self.linear(torch.einsum("bsh->sbh", h)).movedim(1, 0)


SERVED = LengthFirst, Flattened, Heads, Doubled, Folded


@moving
def Experts(self, h, ids):
    """Routed tokens are gathered for each of two experts, one of them the linear."""
    flat, chosen = h.reshape(-1, 16), (ids.reshape(-1) % 2 == 0).nonzero()[:, 0]
    out = flat.clone()
    out[chosen] = self.linear(flat[chosen])
    return out.view_as(h)


@moving
def Sorted(self, h, ids):
    order = ids.sum(1).argsort()
    return self.linear(h[order])[order.argsort()]


@moving
def Indexed(self, h, ids):
    order = ids.sum(1).argsort()
    return self.linear(h.index_select(0, order)).index_select(0, order.argsort())


@moving
def SortedSometimes(self, h, ids):
    """What a value says decides: the path of one input is not that of another of its shape."""
    return Sorted.moved(self, h, ids) if ids[0, 0] % 2 else self.linear(h)


@moving
def Reordered(self, h, ids):
    """What the module was told decides."""
    if self.order is None:
        return self.linear(h)
    order = torch.tensor(self.order[: len(h)]).argsort()
    return self.linear(h[order])[order.argsort()]


@moving
def Flipped(self, h, ids):
    return self.linear(h.flip(0)).flip(0)


@moving
def Rolled(self, h, ids):
    return self.linear(torch.cat([h[1:], h[:1]])).roll(1, 0)


@moving
def Placed(self, h, ids):
    moved = torch.empty_like(h)
    moved[ids.sum(1).argsort().argsort()] = h
    return self.linear(moved)[ids.sum(1).argsort().argsort()]


@moving
def Swapped(self, h, ids):
    if len(h) < 2:
        return self.linear(h)
    moved = h.clone()
    moved[0], moved[1] = h[1], h[0]
    out = self.linear(moved)
    return torch.cat([out[1:2], out[:1], out[2:]])


@moving
def Chosen(self, h, ids):
    order = ids.sum(1).argsort()
    return self.linear(torch.where(h < 1e9, h[order], h))[order.argsort()]


@moving
def Overwritten(self, h, ids):
    """Through another view of the same memory."""
    order, moved = ids.sum(1).argsort(), h.clone()
    flat = moved.view(-1, 16)
    moved.copy_(h[order])
    return self.linear(flat).view_as(h)[order.argsort()]


@moving
def Filled(self, h, ids):
    order, moved = ids.sum(1).argsort(), h.clone()
    moved[:] = h[order]
    return self.linear(moved)[order.argsort()]


@moving
def Guided(self, h, ids):
    """Twice the rows, one half after the other."""
    return self.linear(torch.cat([h, -h])).chunk(2)[0]


@moving
def Recurrent(self, h, ids):
    torch.manual_seed(0)
    return self.linear(nn.GRU(16, 16, batch_first=True)(h)[0])


@moving
def Finishing(self, h, ids):
    """Requests that are done leave; with as many tokens as requests the count of others may look right."""
    going = ids[:, 0] % 3 != 0
    out = torch.zeros_like(h)
    out[going] = self.linear(h[going])
    return out


MAY_BE_REFUSED = (
    Experts, Sorted, Indexed, SortedSometimes, Reordered, Flipped, Rolled, Placed, Swapped, Chosen, Overwritten, Filled,
    Guided, Recurrent, Finishing,
)  # fmt: skip


@pytest.mark.parametrize("model", [*SERVED, *MAY_BE_REFUSED], ids=lambda m: m.__name__)
def test_rows_that_move(model):
    case, refused = Case(model().eval(), ["linear"]), model in MAY_BE_REFUSED
    for seed in range(60):
        rng = draw(seed)
        who = requests(rng)
        ids = torch.randint(3, V, (len(who), rng.choice([1, 2, len(who)])))
        if seed == 30:
            case.model.order = [2, 0, 3, 1]
            for alone in case.alone.values():
                getattr(alone, "model", alone).order = [2, 0, 3, 1]
        case.check({"ids": ids}, who, lambda i, ids=ids: {"ids": ids[i : i + 1]}, refused)


class Routed(Moving):
    """Experts with rows that follow their tokens."""

    served = None

    def moved(self, h, ids):
        flat, chosen = h.reshape(-1, 16), (ids.reshape(-1) % 2 == 0).nonzero()[:, 0]
        out = flat.clone()
        if self.served is None:
            out[chosen] = self.linear(flat[chosen])
        else:
            mine = self.served.requests(h)
            with self.served.rows(mine[chosen]):
                out[chosen] = self.linear(flat[chosen])
        return out.view_as(h)


def test_rows_that_are_given():
    case = Case(Routed().eval(), ["linear"])
    case.model.served = case.served
    for seed in range(30):
        rng = draw(seed)
        who = requests(rng)
        ids = torch.randint(3, V, (len(who), rng.choice([1, 2, len(who)])))
        assert case.check({"ids": ids}, who, lambda i, ids=ids: {"ids": ids[i : i + 1]})
    with case.served.rows([5, 5]):
        assert case.served.requests(torch.ones(1, 2, 16)).tolist() == [0, 0], "nothing outside a call"


@pytest.mark.parametrize(("index", "message"), [
    ([0, 7], "rows must be below 2, the number of requests, got 7"),
    ([0.5, 1.0], "rows must be whole numbers, one a row, got torch.float32 [2]"),
    ([[0], [1]], "rows must be whole numbers, one a row, got torch.int64 [2, 1]"),
    ([0], "rows must have one entry for each of the 2 rows that linear got, got 1"),
], ids=str)  # fmt: skip
def test_rows_that_do_not_fit(index, message):
    case = Case(Moving().eval(), ["linear"])

    def moved(h, ids):
        with case.served.rows(index):
            return case.model.linear(h)

    case.model.moved = moved
    with pytest.raises(ValueError) as error:
        case.served(ids=torch.ones(2, 1, dtype=torch.int64), adapters=["a", None])
    assert message in str(error.value)


@pytest.mark.parametrize("flat", [False, True], ids=["one row", "no row"])
def test_packed(flat):
    """Lengths say whose tokens are whose; a request may have none."""
    case = Case(moving(Flattened.moved)().eval(), ["linear"])
    for seed in range(20):
        rng = draw(seed)
        who = requests(rng)
        lengths = [rng.randint(0, 4) for _ in who]
        ids = torch.randint(3, V, (sum(lengths),))
        got = case.served(ids=ids if flat else ids[None], adapters=who, lengths=lengths).reshape(-1, 16)
        for name, part, own in zip(who, got.split(lengths), ids.split(lengths), strict=True):
            torch.testing.assert_close(part, case.alone[name](ids=own[None])[0], atol=1e-5, rtol=0)


def test_packed_llama():
    """As transformers packs: positions that begin anew."""
    case = Case(tiny("llama"), DECODER)
    for seed in range(6):
        rng = draw(seed)
        who = requests(rng)
        lengths = [rng.randint(1, 5) for _ in who]
        ids = [torch.randint(3, V, (1, n)) for n in lengths]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = dict(input_ids=torch.cat(ids, 1), position_ids=positions, use_cache=False)
        got = case.served(**packed, adapters=who, lengths=lengths).logits.split(lengths, 1)
        for i, name in enumerate(who):
            torch.testing.assert_close(got[i], case.alone[name](input_ids=ids[i]).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("lengths", "message"), [
    ([3], "lengths must be 2 whole numbers, got [3]"), ([3, -1], "lengths must be 2 whole numbers"),
    ([2, 2], "ids must have the 4 tokens that lengths has, in one row, got [1, 3]"),
], ids=str)  # fmt: skip
def test_lengths_that_do_not_fit(lengths, message):
    case = Case(Flattened().eval(), ["linear"])
    with pytest.raises(ValueError) as error:
        case.served(ids=torch.ones(1, 3, dtype=torch.int64), adapters=["a", None], lengths=lengths)
    assert message in str(error.value)


def test_a_batch_that_goes_on_with_fewer():
    """A loop of one's own over the model that drops finished requests."""
    case = Case(tiny("llama"), DECODER)
    ids = torch.randint(3, V, (4, 3))

    served = case.served
    generate = served.model.generate

    def shrinking(input_ids, **_):
        served.model(input_ids=input_ids)
        return served.model(input_ids=input_ids[:2])

    served.model.generate = shrinking
    try:
        for options in ({}, {"num_beams": 2}):
            given = ids if not options else ids[:2]
            who = ["a", None, "b", "a"][: len(given)]
            with pytest.raises(ValueError, match="input_ids must have .* of the call's"):
                served.generate(given, adapters=who, **options)
    finally:
        served.model.generate = generate


def test_what_was_followed_once_is_known():
    """The second forward of these shapes is not followed, unless something in it depends on a value."""
    for model, targets, known in ((tiny("llama"), DECODER, True), (SortedSometimes().eval(), ["linear"], False)):
        case = Case(model, targets)
        names = {"input_ids" if known else "ids": torch.full((3, 2), 4)}
        for _ in range(2):
            case.served(**names, adapters=["a", None, "b"])
        assert bool(case.served._paths.found) == known
