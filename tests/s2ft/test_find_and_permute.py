# SPDX-License-Identifier: Apache-2.0
"""lrkern.s2ft.find and permute: which parts are told, what is refused, and that any order computes the same."""

import json

import pytest
import s2ft_models
import tiny_models
import torch
import transformers
from s2ft_models import MODELS, another_order, assert_same_bits, batch, bits, logits, made
from torch import nn

from lrkern.s2ft import FFN, Attention, Chosen, Record, find, permute, reorder, select, unpermute


def orders(model, seed=0):
    return another_order(find(model), seed)


# ---- find


def test_parts():
    """Heads, sizes and names of each part, by hand."""
    llama, bert = find(made("llama-gqa")), find(made("bert"))
    at = "model.layers.1."
    attention = [f"{at}self_attn{n}" for n in ("", ".q_proj", ".k_proj", ".v_proj", ".o_proj")]
    gate, up, down = (f"{at}mlp.{n}_proj" for n in ("gate", "up", "down"))
    assert llama[2:] == [Attention(*attention, 4, 2, 8), FFN(f"{at}mlp", (gate, up), down, 48, up)]
    at = "bert.encoder.layer.0."
    attention = [f"{at}attention.{n}" for n in ("self", "self.query", "self.key", "self.value", "output.dense")]
    up, down = f"{at}intermediate.dense", f"{at}output.dense"
    assert bert[:2] == [Attention(*attention, 4, 4, 8), FFN(at[:-1], (up,), down, 48, up)]
    assert [len(find(made(kind))) for kind in MODELS] == [4] * len(MODELS)
    assert {type(p) for p in find(made("qwen3"), ffn=False)} == {Attention}


@pytest.mark.parametrize("kind", ["bart", "opt", "whisper", "llava"])
def test_other_models_by_their_shapes(kind):
    """None of them is named anywhere; bart's decoder has two attentions a block."""
    model = tiny_models.tiny(kind)
    found = find(model)
    before = bits(model)
    record = reorder(model, orders(model))
    assert len(record.orders) == len(found) >= 4
    unpermute(model, record)
    assert_same_bits(model, before)


def own(kind, **config):
    return getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**s2ft_models.SIZES, num_key_value_heads=2, pad_token_id=0, **config)
    )


def changed(kind, change):
    model = made(kind)
    change(model)
    return model


def swap(layer, name, module):
    setattr(layer, name, module)


first = lambda m: m.model.layers[0]
REFUSED = {
    "gpt2": (lambda: tiny_models.tiny("gpt2"), "linears of its own for query, key and value, got GPT2Attention"),
    "bloom": (lambda: tiny_models.tiny("bloom"), "linears of its own .* got BloomAttention"),
    "phi3": (lambda: own("Phi3"), "linears of its own .* got Phi3Attention"),
    "t5": (lambda: tiny_models.tiny("t5"), r"decoder\.block\.0\.layer\.2 must have attention"),
    "moe": (lambda: tiny_models.tiny("mixtral"), r"model\.layers\.0 must have beside attention two or three linears"),
    "shared expert": (lambda: tiny_models.tiny("qwen2_moe"), r"got .*shared_expert_gate \[1, 32\]"),
    "norm over all heads": (lambda: own("Olmo2"), r"tell heads apart .* got .*q_norm\.weight \[32\]"),
    "sinks": (lambda: own("GptOss", head_dim=8, num_local_experts=2), r"tell heads apart .* got .*sinks \[4\]"),
    "a head's own size": (
        lambda: changed("llama-mha", lambda m: setattr(first(m).self_attn, "sinks", nn.Parameter(torch.ones(12)))),
        r"tell heads apart .*sinks \[12\]",
    ),
    "alibi": (lambda: changed("bert", lambda m: setattr(m.config, "position_embedding_type", "alibi")), "alibi"),
    "random blocks": (
        lambda: transformers.BigBirdModel(transformers.BigBirdConfig(**s2ft_models.SIZES)),
        "must not attend to random blocks",
    ),
    "position biases of all blocks": (
        lambda: transformers.MPNetModel(transformers.MPNetConfig(**s2ft_models.SIZES)),
        r"no values by head outside its blocks, got encoder\.relative_attention_bias\.weight \[32, 4\]",
    ),
    "a linear for them": (
        lambda: changed("bert", lambda m: swap(m.bert.encoder, "rel_pos_bias", nn.Linear(9, 4, bias=False))),
        r"outside its blocks, got bert\.encoder\.rel_pos_bias\.weight \[4, 9\]",
    ),
    "norm before o": (
        lambda: changed("bert", lambda m: _sub_norm(m.bert.encoder.layer[0].attention.output)),
        r"nothing between the heads and .*output\.dense, got .*\[32\]",
    ),
    "value a channel": (
        lambda: changed("llama-gqa", lambda m: swap(first(m).mlp, "act_fn", nn.PReLU(48))),
        r"48 channels apart, got model\.layers\.0\.mlp\.act_fn\.weight \[48\]",
    ),
    "no attention beside": (
        lambda: changed("llama-gqa", lambda m: swap(m.model.layers[1], "self_attn", nn.Identity())),
        r"model\.layers\.1 must have attention",
    ),
    "other heads": (
        lambda: changed("llama-gqa", lambda m: setattr(first(m).self_attn, "head_dim", 6)),
        r"self_attn must have 4 heads of 6",
    ),
    "other groups": (
        lambda: changed("llama-gqa", lambda m: setattr(first(m).self_attn, "num_key_value_groups", 4)),
        r"must have 2 heads for a key and value head",
    ),
    "hook": (
        lambda: changed("llama-gqa", lambda m: first(m).mlp.up_proj.register_forward_hook(lambda *a: None)),
        r"up_proj must be a plain nn\.Linear",
    ),
    "parametrized": (
        lambda: changed("llama-gqa", lambda m: nn.utils.parametrizations.weight_norm(first(m).mlp.up_proj)),
        r"up_proj must .*",
    ),
    "tied": (
        lambda: changed("llama-gqa", lambda m: setattr(first(m).mlp.up_proj, "weight", first(m).mlp.gate_proj.weight)),
        r"gate_proj\.weight must stand at one place of the model, got .*up_proj\.weight",
    ),
    "shared module": (
        lambda: changed("llama-gqa", lambda m: swap(m.model.layers[1], "mlp", first(m).mlp)),
        r"model\.layers\.1 must have beside attention|must stand at one place",
    ),
}


def _sub_norm(output):
    dense, norm = output.dense, output.LayerNorm
    del output._modules["dense"], output._modules["LayerNorm"]
    output.LayerNorm, output.dense = norm, dense


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    make, text = REFUSED[why]
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=text):
        find(model)
    with pytest.raises(ValueError, match=text):
        select(model, o=0.5, down=0.5, v=0.5, up=0.5)
    assert_same_bits(model, before)


def test_as_many_labels_as_heads():
    """Or as frequencies: by chance."""
    for labels in (4, 32):
        config = transformers.BertConfig(**s2ft_models.SIZES, num_labels=labels)
        assert len(find(transformers.BertForSequenceClassification(config))) == 4
    assert made("llama-gqa").model.rotary_emb.inv_freq.shape == (4,)


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_of_a_part_that_is_not_asked_for_nothing_is_asked(part):
    """Experts beside attention; norms over all heads beside a feed-forward part."""
    model = own("Mixtral", num_local_experts=3) if part == "attention" else own("Olmo2")
    kind, asked = (Attention, {"o": 0.5}) if part == "attention" else (FFN, {"down": 0.5})
    assert {type(p) for p in find(model, attention=kind is Attention, ffn=kind is FFN)} == {kind}
    ids = {"input_ids": batch()["input_ids"]}
    before, y = bits(model), logits(model, **ids)
    record, _ = permute(model, select(model, **asked, groups=True, generator=1), ids)
    assert len(record.orders) == 2
    torch.testing.assert_close(logits(model, **ids), y, rtol=0, atol=1e-5)
    assert any(not torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="neither"):
        find(model, attention=False, ffn=False)


# ---- any order computes the same


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_any_order_computes_the_same(kind, seed):
    model = made(kind)
    before, y = bits(model), logits(model)
    record = reorder(model, orders(model, seed))
    assert len(record.orders) == 4
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    one = kind == "mistral"  # key and value head
    every = {f"{n}.weight" for part, _ in record.orders for n in part.linears if not (one and n[-6:-5] in "kv")}
    assert every <= moved  # o and down by column, the others by row
    off = (logits(model) - y).abs().max()
    assert 0 < off <= 1e-5
    record = Record.from_json(json.loads(json.dumps(record.to_json())))
    unpermute(model, record)
    assert_same_bits(model, before)
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("kind", ["llama-mha", "llama-gqa", "bert"])
def test_a_wrong_order_would_show(kind):
    """One linear left out, and the outputs are far off: the test above can fail."""
    model, y = made(kind), None
    for part in find(model):
        for left in part.linears:
            model = made(kind)
            y = logits(model) if y is None else y
            kept = bits(model.get_submodule(left))
            reorder(model, [(p, o) for p, o in orders(model, 2) if p == part])
            model.get_submodule(left).load_state_dict(kept)
            assert (logits(model) - y).abs().max() > 1e-3, left


@pytest.mark.parametrize("kind", ["llama-mha", "llama-gqa", "qwen3", "bert"])
def test_planted_units_come_first(kind):
    """Heads and channels with large weights are found, and stand first in the planted places' stead."""
    model, planted = made(kind), {}
    with torch.no_grad():
        for i, part in enumerate(find(model)):
            group = part.group
            units = [1, 3] if isinstance(part, Attention) and group == 1 else [1] if group > 1 else [5 + i, 17, 40]
            target = next(iter(part.targets().values()))
            size = target.size * group
            columns = torch.tensor([u * size + c for u in units for c in range(size)])
            model.get_submodule(target.linear).weight[:, columns] *= 30
            planted[target.linear] = columns
    y, before = logits(model), bits(model)
    kv = find(model)[0].kv_heads
    heads = {4: 2 / 4, 2: 1 / 2}[kv]
    selection = select(model, o=heads, down=3 / 48, by="weight", multiple=1, groups=True)
    assert {n: c.index.tolist() for n, c in selection.items()} == {n: c.tolist() for n, c in planted.items()}
    record, moved = permute(model, selection, batch())
    for name, columns in planted.items():
        assert moved[name] == Chosen("input", moved[name].index)
        assert moved[name].index.tolist() == list(range(len(columns)))
        assert record.channels(name, "input")[: len(columns)].tolist() == columns.tolist()
        now, was = model.get_submodule(name).weight, before[f"{name}.weight"]
        assert torch.equal(now[:, : len(columns)], was[:, columns])
    torch.testing.assert_close(logits(model), y, rtol=1e-5, atol=1e-5)
    unpermute(model, record)
    assert_same_bits(model, before)


@pytest.mark.parametrize("kind", ["llama-mha", "qwen2", "bert"])
def test_makers_and_takers_both_contiguous(kind):
    """v beside o and up beside down: only v, both, only o, the rest."""
    model, y = made(kind), logits(made(kind))
    selection = select(model, o=0.5, v=0.5, down=0.4, up=0.3, multiple=1, generator=3)
    assert len(selection) == 8
    record, moved = permute(model, selection)
    for part, _ in record.orders:
        maker, taker = (
            moved[part.targets()[role].linear] for role in (("v", "o") if part.name.count("att") else ("up", "down"))
        )
        assert (maker.side, taker.side) == ("output", "input")
        assert maker.index.tolist() == list(range(len(maker.index)))
        assert (taker.index.diff() == 1).all()
    for name, chosen in moved.items():  # the same channels
        was = record.channels(name, chosen.side)[chosen.index]
        assert sorted(was.tolist()) == selection[name].index.tolist()
    assert (logits(model) - y).abs().max() <= 1e-5


def test_sixteen_bits():
    """bf16 weights move bit for bit too."""
    model = made("llama-gqa").bfloat16()
    before = bits(model)
    record, _ = permute(model, select(model, down=0.25, generator=0), batch())
    unpermute(model, record)
    assert_same_bits(model, before)


def whole(heads):
    return torch.cat([torch.arange(8) + 8 * h for h in heads])


O, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "chosen", "text"),
    [
        (O, Chosen("input", whole([0, 2])), "o_proj must be chosen in whole units of 16 channels, for one order"),
        (O, Chosen("input", torch.arange(17)), "whole units of 16"),
        (O, Chosen("output", whole([0, 1])), "side input, got side output"),
        (O, Chosen("input", torch.tensor([0, 0])), "distinct"),
        (DOWN, Chosen("input", torch.tensor([48])), r"0\.\.47"),
        (DOWN, Chosen("input", torch.tensor([-1])), r"0\.\.47"),
        (DOWN, Chosen("input", torch.tensor([1.0])), "whole numbers"),
        ("lm_head", Chosen("input", torch.tensor([1])), "lm_head must be a linear that select chooses of"),
    ],
)
def test_permute_refuses(name, chosen, text):
    model = made("llama-gqa")
    before = bits(model)
    with pytest.raises(ValueError, match=text):
        permute(model, {name: chosen})
    assert_same_bits(model, before)


def test_an_example_tells_what_shapes_do_not():
    """A model whose forward knows heads by number is put back and refused."""

    class ByNumber(type(made("bert").bert.encoder.layer[0].attention.self)):
        def forward(self, *args, **kwargs):
            y, weights = super().forward(*args, **kwargs)
            return y * torch.arange(1.0, 5.0).repeat_interleave(8), weights

    model = made("bert")
    model.bert.encoder.layer[0].attention.self.__class__ = ByNumber
    before, selection = bits(model), {"bert.encoder.layer.0.attention.output.dense": Chosen("input", whole([3]))}
    with pytest.raises(ValueError, match="the model is as it was"):
        permute(model, selection, batch())
    assert_same_bits(model, before)
    permute(model, selection)  # nobody asked


def test_records_are_held_against_the_model():
    model = made("llama-gqa")
    before = bits(model)
    record = reorder(model, orders(model))
    part, order = record.orders[0]
    for wrong, text in [
        ([(part, order[:-1])], "each of 0..3 once"),
        ([(part, torch.tensor([0, 0, 1, 2]))], "each of 0..3 once"),
        ([(part, torch.tensor([0, 2, 1, 3]))], "keep the 2 heads of a key and value head together"),
        ([(part, order), (part, order)], "of one part"),
    ]:
        for call in (lambda m, w: reorder(m, w), lambda m, w: unpermute(m, Record(tuple(w)))):
            now = bits(model)
            with pytest.raises(ValueError, match=text):
                call(model, wrong)
            assert_same_bits(model, now)
    with pytest.raises(ValueError, match="q must be a linear of the model"):
        unpermute(model, Record(((part._replace(q="q"), order),)))
    with pytest.raises(ValueError, match="must have 40 rows, got 32"):
        unpermute(model, Record(((part._replace(head_dim=10), order),)))
    with pytest.raises(ValueError, match="must be a part of the model"):
        reorder(model, [(part._replace(q="q"), order)])
    entry = record.to_json()[0]
    for wrong in (None, [1], [["Attention"]], [["X", *entry[1:]]], [[entry[0], entry[1] | {"heads": "4"}, entry[2]]],
                  [[entry[0], entry[1] | {"q": 4}, entry[2]]], [[*entry[:2], [0.5]]], [[entry[0], {}, entry[2]]]):  # fmt: skip
        with pytest.raises(ValueError, match=r"must be a list of \[kind, part, order\]"):
            Record.from_json(wrong)
    unpermute(model, record)
    assert_same_bits(model, before)
