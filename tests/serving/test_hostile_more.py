# SPDX-License-Identifier: Apache-2.0
"""What anybody may give beside files; random damage; and that what PEFT reads goes on meaning what it means there."""

import contextlib
import gc
import random
import subprocess
import time

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("hypothesis")
import hypothesis
import peft
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from test_hostile import CONFIG, NAMES, WEIGHTS, Doors, lora_parts, model, ours, own_file, same, vera_parts, write

import lrkern.files
import lrkern.peft
from lrkern.files import folder, patterns, read
from lrkern.files.own import read_layers
from lrkern.nn import NOLALinear
from lrkern.serving import FAMILIES, AdapterPool

# ---- the pool's own settings, and what pool.add is given

SETTINGS = {
    "budget of words": (dict(budget="2GB"), "budget must be a whole number above 0, got '2GB'"),
    "budget negative": (dict(budget=-1), "budget must be a whole number above 0, got -1"),
    "budget 0": (dict(budget=0), "budget must be a whole number above 0, got 0"),
    "budget true": (dict(budget=True), "budget must be a whole number above 0, got True"),
    "budget a float": (dict(budget=2e9), "budget must be a whole number above 0, got 2000000000.0"),
    "budget of 400 digits": (dict(budget=10**400), "budget must be a whole number above 0, got 1000"),
    "pages negative": (dict(pages=-1), "pages must be a whole number above 0, got -1"),
    "pages a float": (dict(pages=4.0), "pages must be a whole number above 0, got 4.0"),
    "pages true": (dict(pages=True), "pages must be a whole number above 0, got True"),
    "pages a string": (dict(pages="4"), "pages must be a whole number above 0, got '4'"),
    "max_rank a float": (dict(pages=1, max_rank=8.0), "max_rank must lie in 1..512, got 8.0"),
    "max_rank true": (dict(pages=1, max_rank=True), "max_rank must lie in 1..512, got True"),
    "max_rank None": (dict(pages=1, max_rank=None), "max_rank must lie in 1..512, got None"),
    "max_adapters 0": (dict(pages=1, max_adapters=0), "max_adapters must be a whole number above 0, got 0"),
    "max_adapters inf": (dict(pages=1, max_adapters=float("inf")), "max_adapters must be a whole number above 0"),
    "targets a number": (dict(pages=1, targets=7), "targets must be a string or a list of them, got 7"),
    "targets numbers": (dict(pages=1, targets=[1]), r"targets must be a string or a list of them, got \[1\]"),
    "targets None": (dict(pages=1, targets=None), "targets must be a string or a list of them, got None"),
    "targets no regex": (dict(pages=1, targets="(("), r"targets must be a regex: missing \)"),
    "targets nested": (dict(pages=1, targets="(" * 5000 + ")" * 5000), "targets must be a regex: "),
    "targets empty": (dict(pages=1, targets=[]), "targets must name linears of the model"),
    "dtype a string": (dict(pages=1, dtype="float16"), "dtype must be float32, float16 or bfloat16, got 'float16'"),
    "dtype a list": (dict(pages=1, dtype=[torch.float16]), "dtype must be float32, float16 or bfloat16"),
    "parallel a string": (dict(pages=1, parallel="column"), "parallel must say column or row by name, got 'column'"),
    "parallel a list": (dict(pages=1, parallel=["q_proj"]), "parallel must say column or row by name"),
    "parallel lists": (dict(pages=1, parallel={"q_proj": ["row"]}), r"parallel must say column or row, got \[\['row'\]\]"),
    "parallel keys": (dict(pages=1, parallel={1: "row"}), "parallel must say column or row by name"),
    "a model of none": (dict(pages=1, model=None), "model must be an nn.Module, got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_pool(name):
    given, message = SETTINGS[name]
    with pytest.raises(ValueError, match=f"lrkern.serving: {message}"):
        AdapterPool(**{"model": model()} | given)


def changed(change):
    config, tensors = lora_parts()
    key = next(iter(tensors))
    tensors[key] = change(tensors[key])
    return config, tensors


GIVEN = {
    "no config": ((None, {}), "config must be an object, got NoneType"),
    "a config of words": (("LORA", {}), "config must be an object, got str"),
    "no tensors": ((lora_parts()[0], None), "tensors must be tensors by key, got NoneType"),
    "a list of tensors": ((lora_parts()[0], [torch.ones(2)]), "tensors must be tensors by key, got list"),
    "keys of numbers": ((lora_parts()[0], {1: torch.ones(2)}), "tensors must be tensors by key, got 1"),
    "arrays": ((lora_parts()[0], {"a": [1.0]}), "tensors must be tensors by key, got 'a'"),
    "meta tensors": (changed(lambda t: t.to("meta")), "must hold all its values, got none"),
    "sparse tensors": (changed(lambda t: t.to_sparse()), "must hold all its values, got sparse"),
    "float8 scales": (changed(lambda t: t.to(torch.float8_e8m0fnu)), "must be float64, .*, got torch.float8_e8m0fnu"),
    "complex": (changed(lambda t: t.to(torch.complex64)), "must be float64, .*, got torch.complex64"),
    "bool": (changed(lambda t: t.bool()), "must be float64, .*, got torch.bool"),
    "of no size": (changed(lambda t: t[:0]), r"must have shape \[4, 16\], got \[0, 16\]"),
    "a scalar": (changed(lambda t: t.sum()), r"must have shape \[4, 16\], got \[\]"),
    "nested": (changed(lambda t: torch.nested.nested_tensor(list(t))), "must hold all its values, got"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("name", GIVEN)
def test_what_add_is_given(tmp_path, name):
    doors, (parts, message) = Doors(tmp_path), GIVEN[name]
    before = doors.state()
    for call in (lambda: doors.pool.add("new", *parts), lambda: doors.pool.add("lora", *parts, replace=True)):
        with pytest.raises(ValueError, match=message) as refusal:
            call()
        assert ours(refusal.value) and same(doors.state(), before)


def test_a_family_of_somebodys_own_that_breaks(tmp_path, monkeypatch):
    doors = Doors(tmp_path)
    before = doors.state()
    for broken in (lambda *_: {}["x"], lambda *_: 1 // 0, lambda *_: None.x, lambda *_: torch.ones(2) @ torch.ones(3)):
        monkeypatch.setitem(FAMILIES, "OWN", broken)
        with pytest.raises(ValueError, match="adapter 'new': .*; the pool is unchanged"):
            doors.pool.add("new", {"peft_type": "OWN"}, {})
        assert same(doors.state(), before)


def test_of_the_largest_rank_that_no_pool_takes_nothing_is_drawn(tmp_path, monkeypatch):
    """The vectors agree with the config: only then may a pair be drawn, and not one that no page holds."""
    doors, r = Doors(tmp_path), 16 * 16 + 1
    config, tensors = vera_parts()
    tensors = {k: torch.ones(r) if k.endswith("_d") else t for k, t in tensors.items()}
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda *_, **__: pytest.fail("a pair was drawn"))
    for wrong in ({"r": r}, {"r": 40_000_000}):
        with pytest.raises(ValueError, match="rank must lie in 1..256, got 257|must have shape"):
            doors.pool.add("new", config | wrong, tensors)


def test_a_loaded_layer_is_no_window_on_its_file(tmp_path):
    """Whoever overwrites the file in place, or cuts it, does not touch the model."""
    path, net = own_file(tmp_path / "own"), model()
    lrkern.files.load(net, path)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with path.open("r+b") as f:
        f.write(b"\xff" * path.stat().st_size)
    assert same(list(net.state_dict().items()), list(before.items()))


# ---- random damage

SEED = random.SystemRandom().randrange(2**32)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-5, 40) | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, 2**63, -(2**63) - 1, 1e39, "false", "q_proj", "(a+)+!", ".*q", "((", "\ud800", "LORA", "VERA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = st.sampled_from(
    ["peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "bias",
     "layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "fan_in_fan_out",
     "projection_prng_key", "save_projection", "sparse", "very_sparse", "modules_to_save", "layer_replication", "use_qalora"],
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return Doors(tmp_path_factory.mktemp("fuzz"))


def only_value_errors(doors, calls, before):
    for call in calls:
        start = time.monotonic()
        try:
            call()
        except ValueError as error:
            assert ours(error), repr(error.__cause__)
            assert same(doors.state(), before)
        assert time.monotonic() - start < 3
        if "new" in doors.pool:  # it was good
            doors.pool.remove("new")


def fuzz(examples):
    print(f"seed {SEED}")
    quiet = dict(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    return lambda test: hypothesis.seed(SEED)(hypothesis.settings(max_examples=examples, **quiet)(test))


@pytest.mark.parametrize("family", ["LORA", "VERA"])
def test_random_configs(fuzzed, family):
    count = iter(range(10**9))
    before = fuzzed.state()

    @fuzz(80)
    @hypothesis.given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
    def check(change):
        config, tensors = lora_parts() if family == "LORA" else vera_parts()
        config |= change
        path = write(fuzzed.tmp / f"{family}{next(count)}", (config, tensors))
        loads = [lambda: fuzzed.pool.load("new", path), lambda: fuzzed.pool.add("new", config, tensors)]
        only_value_errors(fuzzed, [*loads, *list(fuzzed.of_folder(path))[2:3]], before)

    # A good one may be loaded into the layers: all ones, as they are then.
    lrkern.peft.load_adapter(fuzzed.fused, write(fuzzed.tmp / f"{family} good", lora_parts()))
    before = fuzzed.state()
    check()


@pytest.mark.parametrize("kind", ["LORA", "VERA", "own", "config"])
def test_random_bytes(fuzzed, kind):
    count = iter(range(10**9))
    parts = vera_parts() if kind == "VERA" else lora_parts()
    if kind == "own":
        good = own_file(fuzzed.tmp / "own good").read_bytes()
    else:
        good = (write(fuzzed.tmp / f"bytes {kind}", parts) / (CONFIG if kind == "config" else WEIGHTS)).read_bytes()
    header = int.from_bytes(good[:8], "little") + 8 if kind != "config" else len(good)

    @fuzz(200)
    @hypothesis.given(
        st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), max_size=3), st.integers(0, len(good)),
        st.booleans(), st.binary(max_size=4),
    )  # fmt: skip
    def check(changes, end, cut, more):
        data = bytearray(good)
        for at, value in changes:
            data[at] = value
        data = bytes(data[:end] if cut else data) + more
        path = fuzzed.tmp / f"damaged {kind}{next(count)}"
        if kind == "own":
            path.write_bytes(data)
            calls = [lambda: fuzzed.pool.load("new", path), lambda: read_layers(path)]
        else:
            write(path, parts)
            (path / (CONFIG if kind == "config" else WEIGHTS)).write_bytes(data)
            calls = [lambda: fuzzed.pool.load("new", path), lambda: folder.read_adapter(path)]
        only_value_errors(fuzzed, calls, before)

    before = fuzzed.state()
    check()


# ---- what is read goes on meaning what PEFT reads

MODEL = [
    f"model.layers.{i}.{m}"
    for i in range(12)
    for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.3.up_proj")
]
MODEL += ["lm_head", "q_proj", "model.layers.q_proj", "model.embed.3.q_proj"]
TARGETS = [
    ["q_proj"], ["q_proj", "lm_head"], ["layers.1.self_attn.q_proj"], ["self_attn.q_proj", "up_proj"], [""], ["proj"],
    ".*q_proj", r".*\.(q|v)_proj", r"model\.layers\.(?:0|1|11)\..*", r"(?!.*experts).*_proj", r".*(?<=layers\.)1\..*",
    r"(?i).*Q_PROJ", r"model\.layers\.(\d)\..*\1.*", "lm_head|q_proj", "q_proj", r"model\.layers\.\d{2}\.self_attn\.[a-z]_proj",
    r"(?:model\.)+.*", r"(.*\.)*up_proj", r"[^.]+\.[^.]+\.[0-5].*", "nothing", r".*\.(?:self_attn|mlp\.experts\.\d+)\.\w+",
]  # fmt: skip
MORE = [
    {}, {"exclude_modules": ["q_proj"]}, {"exclude_modules": r".*\.1.*"}, {"exclude_modules": r"(?!model).*"},
    {"layers_to_transform": 1}, {"layers_to_transform": [0, 11]}, {"layers_to_transform": []},
    {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
    {"layers_to_transform": [3], "layers_pattern": ["embed", "experts"]}, {"layers_to_transform": [3], "layers_pattern": []},
    {"layers_to_transform": [3], "layers_pattern": ""}, {"layers_to_transform": [1], "layers_pattern": r"(?=l)layers|embed"},
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_are_what_peft_targets(target):
    for more in MORE:
        try:
            config = peft.LoraConfig(target_modules=target, **more)
        except ValueError:
            with pytest.raises(ValueError, match="must be absent where target_modules is a string"):
                folder.targeted({"target_modules": target, **more}, MODEL)
            continue
        theirs = {name for name in MODEL if check_target_module_exists(config, name)}
        assert folder.targeted({"target_modules": target, **more}, MODEL) == theirs
        assert folder.targeted(config.to_dict(), MODEL) == theirs


PATTERN_KEYS = [
    "q_proj", "self_attn.q_proj", "^model.layers.1.self_attn.q_proj", r"^lm_head", r"model\.layers\.\d\.self_attn\.v_proj",
    r".*experts.*", r"(?!x)layers\.1\..*", "q_proj|v_proj", r"lm_head$", "lm.head", "_proj", "proj", ".*", r"(?:up)_proj", r"",
    r"[qv]_proj", "a)|(lm_head", "layers.11.self.attn.q_proj", r"layers\.1.\.self_attn\.v_proj", "^q_proj", "^.proj", "...head",
]  # fmt: skip


def test_patterns_are_what_peft_reads():
    rng = random.Random(0)
    for _ in range(60):
        keys = rng.sample(PATTERN_KEYS, rng.randint(1, 5))
        config = {"r": 99, "lora_alpha": 1, "rank_pattern": {k: i + 1 for i, k in enumerate(keys)}}
        theirs = {n: config["rank_pattern"].get(get_pattern_key(keys, n), 99) for n in MODEL}
        assert {n: r for n, (r, _) in folder.ranks_and_scalings(config, MODEL).items()} == theirs, keys


@pytest.mark.parametrize("whole", [False, True])
def test_here_and_elsewhere_are_the_same(whole, monkeypatch):
    texts = [t for t in TARGETS if isinstance(t, str)] + [rf"(.*\.)?({k})$" for k in PATTERN_KEYS]
    texts += [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in ("layers", "experts", "(?:l|e).*")]
    names = [*MODEL, "a\n", "lm_head\n", "é.q_proj", ""]
    ours = [patterns.first_matches("x", [t], names, whole) for t in texts]
    ours.append(patterns.first_matches("x", texts, names, whole))
    monkeypatch.setattr(patterns, "_STEPS", -1)
    theirs = [patterns.first_matches("x", [t], names, whole) for t in texts]
    theirs.append(patterns.first_matches("x", texts, names, whole))
    assert ours == theirs


def test_names_and_simple_patterns_start_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    names = [
        f"model.layers.{i}.{m}_proj" for i in range(80) for m in ("self_attn.q", "self_attn.v", "mlp.up", "mlp.down")
    ]
    for target in (
        ["q_proj", "v_proj"],
        r".*\.(q|v)_proj",
        r".*_proj",
        r"model\.layers\.(0|1|2|3)\.self_attn\.(q|v)_proj",
    ):
        assert folder.targeted({"target_modules": target}, names)
    every = {
        f"^{name.replace('.', chr(92) + '.')}": i for i, name in enumerate(names)
    }  # as convert.to_lora writes them
    start = time.monotonic()
    found = folder.ranks_and_scalings({"r": 1, "lora_alpha": 1, "rank_pattern": every}, names)
    assert [r for r, _ in found.values()] == list(range(len(names))) and time.monotonic() - start < 3
    whole = {name: i for i, name in enumerate(names)}
    assert folder.ranks_and_scalings({"r": 1, "lora_alpha": 1, "rank_pattern": whole}, names) == found


def test_many_shapes_of_names_are_no_way_round():
    rng = random.Random(1)
    text = "layers.1.self_attn.q_proj"
    keys = {"".join("." if rng.random() < 0.5 else c for c in text): i for i in range(20_000)}
    start = time.monotonic()
    with contextlib.suppress(ValueError):
        folder.ranks_and_scalings({"r": 1, "lora_alpha": 1, "rank_pattern": keys}, MODEL * 20)
    assert time.monotonic() - start < 3
    few = dict(list(keys.items())[:40])
    theirs = {n: few.get(get_pattern_key(few, n), 1) for n in MODEL}
    found = folder.ranks_and_scalings({"r": 1, "lora_alpha": 1, "rank_pattern": few}, MODEL)
    assert {n: r for n, (r, _) in found.items()} == theirs and set(theirs.values()) != {1}


def test_of_too_high_a_rank_no_factors_are_made(tmp_path, monkeypatch):
    doors, path = Doors(tmp_path), tmp_path / "own"
    net = model(lambda linear: NOLALinear.from_linear(linear, r=65, k=2, l=2))
    lrkern.files.save(net, path)
    monkeypatch.setattr(NOLALinear, "factors", lambda *_: pytest.fail("factors were made"))
    with pytest.raises(ValueError, match="rank must lie in 1..64"):
        doors.pool.load("new", path)


def test_a_process_that_cannot_start(monkeypatch):
    monkeypatch.setattr(patterns.sys, "executable", "/no/python")
    with pytest.raises(ValueError, match="target_modules cannot be matched without a process of '/no/python'"):
        folder.targeted({"target_modules": "(?=m).*"}, MODEL)


def test_the_collector_is_as_it_was():
    for text in ("[1]", "[", '{"a": 1, "a": 2}'):
        with contextlib.suppress(ValueError):
            read.parse(text)
        assert gc.isenabled()
