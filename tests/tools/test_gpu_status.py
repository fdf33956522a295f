# SPDX-License-Identifier: Apache-2.0
"""The status table of docs/gpu.md is the one its evidence gives, and every measured number in README says where it is from."""

import json
import re
from pathlib import Path

import pytest

from tools import gpu_status, sources
from tools.sources import ROOT, Source

# ---------------------------------------------------------------------------------------------- the status table


def test_docs_are_current():
    page = gpu_status.PAGE.read_text()
    assert page == gpu_status.page_with(gpu_status.status(), page), "run python tools/gpu_status.py"
    module = gpu_status.MODELS.read_text()
    assert module == gpu_status.models_with(gpu_status.all_evidence(), module), "run python tools/gpu_status.py"


def test_kernels_cannot_be_forgotten(tmp_path):
    source, unit = tmp_path / "new.cu", Source("cuda", "new", "", tmp_path / "new.cu")
    body = "template <class T>\n__global__ __launch_bounds__(128, k<T, 2>) void new_one_kernel(int n) {}\n"
    launch = 'int f() { return launch("new_one",\n  new_one_kernel<float>, grid, block, 0, stream, 1); }\n'
    source.write_text(body + launch)
    assert [k.name for k in gpu_status.read_kernels(unit)] == ["new_one"]
    source.write_text(body + launch + "__global__ void __launch_bounds__(64) other_kernel(int n);\n")
    with pytest.raises(ValueError, match="other"):
        gpu_status.read_kernels(unit)
    source.write_text(body + launch.replace('new_one"', 'another"'))  # a launch names the function
    with pytest.raises(ValueError, match="new_one"):
        gpu_status.read_kernels(unit)


def test_the_kernels_are_those_of_the_sources():
    text = "".join(p.read_text() for p in sorted((ROOT / "csrc/cuda").rglob("*.cu")))
    assert len(gpu_status.kernels()) == len(re.findall("__global__", re.sub("//.*", "", text))) > 0


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """Puts what a run of tools/gpu.py leaves into a folder; the table then reads it."""
    monkeypatch.setattr(gpu_status, "EVIDENCE", tmp_path / "evidence")

    def put(date="2026-12-01T10:00+00:00", tests="passed", source=None, share=0.71):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        env = {"date": date, "commit": "0123456789abcdef", "gpu": "NVIDIA H100 80GB HBM3"}
        env["source lora"] = source or sources.digest("lora")
        (out / "env.txt").write_text("".join(f"{k}: {v}\n" for k, v in env.items()))
        states = {"tests:registry": tests, "sanitizer:memcheck": "passed", "sanitizer:racecheck": "refused"}
        parts = {name: {"status": s, "seconds": 1.0, "note": ""} for name, s in states.items()}
        (out / "parts.json").write_text(json.dumps(parts))
        row = {"suite": "kernel", "kernel": "lora_shrink", "dtype": "bfloat16", "of_roof": share}
        (out / "bench.jsonl").write_text(json.dumps(row) + "\n")
        return gpu_status.keep(out)

    return put


def row_of(kernel):
    (row,) = [line for line in gpu_status.status().splitlines() if line.startswith(f"| {kernel} |")]
    return row


def test_without_evidence(evidence):
    for kernel in gpu_status.kernels():
        emulated = "no" if kernel.source.arch in ("100", "120") else "yes"
        assert row_of(kernel.name).endswith(f"| {emulated} | not run on a GPU | - |")


def test_with_evidence(evidence):
    folder = evidence()
    assert folder.name == "2026-12-01-H100-80GB-HBM3-012345678"
    row = row_of("lora_shrink")
    assert f"[2026-12-01 NVIDIA H100 80GB HBM3](../bench/evidence/{folder.name}/summary.md)" in row
    assert "tests passed, sanitizers passed (1 of 2 ran)" in row and row.endswith("| bfloat16 71% |")
    assert row_of("lora_sum").endswith("| - |"), "no figure of its own"


def test_the_last_evidence_counts(evidence):
    evidence()
    evidence(date="2026-12-03T10:00+00:00", tests="failed", share=0.5)
    assert "2026-12-03" in row_of("lora_shrink") and "tests failed" in row_of("lora_shrink")
    assert row_of("lora_shrink").endswith("| bfloat16 50% |")


def test_evidence_for_an_older_source_says_so(evidence):
    evidence(source="0" * 12)
    assert "the source has changed since" in row_of("lora_shrink")


def test_a_model_is_on_record_where_its_tests_passed(evidence):
    module = "before = ()\nGPUS: tuple[str, ...] = ()\nafter = ()\n"
    listed = lambda: gpu_status.models_with(gpu_status.all_evidence(), module)
    evidence(tests="failed")
    assert listed() == module
    evidence(date="2026-12-03T10:00+00:00")
    want = 'before = ()\nGPUS: tuple[str, ...] = (\n    "NVIDIA H100 80GB HBM3",\n)\nafter = ()\n'
    assert listed() == want == gpu_status.models_with(gpu_status.all_evidence(), want)
    assert gpu_status.models_with([], want) == module
    with pytest.raises(ValueError, match="GPUS"):
        gpu_status.models_with([], "")


# ---------------------------------------------------------------------------------------------- fused paths


ROW = {"suite": "lora", "case": "T=8192 pass=fwd", "dtype": "bfloat16", "noise_ms": 0.01}
OLD, NEW = (
    ROW | {"provider": "lrkern", "p50_ms": 1.0, "error": 2e-3},
    ROW | {"provider": "fused", "p50_ms": 0.8, "error": 2e-3},
)
PASSED = {
    "tests:registry": "failed",
    "fused:tests:registry": "passed",
    "fused:sanitizer:memcheck": "refused",
    "bench:lora": "passed",
}


def shown(folder="a", env=None, parts=PASSED, rows=(OLD, NEW)):
    known = {
        "capability": "90",
        "rehearsal": "False",
        "source lora": sources.digest("lora"),
        "date": "2026-12-01",
        "gpu": "NVIDIA H200",
    }
    states = {name: {"status": status} for name, status in parts.items()}
    return gpu_status.Evidence(gpu_status.EVIDENCE / folder, known | (env or {}), states, list(rows))


@pytest.mark.parametrize(
    ("everything", "why"),
    [
        ([], "no run on sm_90"),
        ([shown(env={"capability": "100"})], "no run on sm_90"),
        ([shown(env={"rehearsal": "True"})], "no run on sm_90"),
        ([shown(), shown("b", env={"source lora": "0" * 12})], "the source has changed since b"),
        ([shown(parts=PASSED | {"fused:tests:layers": "failed"})], "tests failed"),
        ([shown(parts=PASSED | {"fused:tests:layers": "skipped"})], "tests passed (1 of 2 ran)"),
        ([shown(parts={"tests:registry": "passed"})], "tests not run"),
        ([shown(parts=PASSED | {"fused:sanitizer:racecheck": "failed"})], "sanitizers failed"),
        ([shown(parts=PASSED | {"bench:lora": "failed"})], "bench:lora failed"),
        ([shown(parts=PASSED | {"bench:lora": "skipped"})], "bench:lora not run"),
        ([shown(rows=[OLD])], "not timed beside the portable path"),
        ([shown(rows=[OLD, NEW | {"case": "another"}])], "not timed beside the portable path"),
        ([shown(rows=[OLD | {"suite": "op"}, NEW | {"suite": "op"}])], "not timed beside the portable path"),
        ([shown(rows=[OLD, NEW | {"error": 5e-3}])], "further off in T=8192 pass=fwd bfloat16"),
        ([shown(rows=[OLD, NEW, OLD | {"case": "T=1"}, NEW | {"case": "T=1", "p50_ms": 1.02}])], "slower in T=1 bfloat16"),
        ([shown(rows=[OLD, NEW | {"p50_ms": 0.995}])], "no faster than noise"),
    ],
)  # fmt: skip
def test_a_fused_path_is_opt_in_until_it_is_right_and_faster(everything, why):
    assert gpu_status.may_be_default("lora", "90", everything) == (False, why)


def test_a_fused_path_that_is_right_and_faster_may_be_the_default():
    more = [OLD | {"case": "T=1"}, NEW | {"case": "T=1", "p50_ms": 0.2}]
    assert gpu_status.may_be_default("lora", "90", [shown(), shown("b", rows=[OLD, NEW, *more])]) == (
        True, "0.40x the portable path's time over 2 cases, b"
    )  # fmt: skip


def test_fused_paths_are_listed_with_their_own_evidence(monkeypatch):
    own = gpu_status.Kernel("lora_own", Source("cuda", "lora", "90", Path("csrc/cuda/lora/sm90.cu")))
    other = gpu_status.Kernel("mx_own", Source("cuda", "mx", "120", Path("csrc/cuda/mx/sm120.cu")))
    portable = [k for k in gpu_status.kernels() if not k.source.arch]
    monkeypatch.setattr(gpu_status, "kernels", lambda: [*portable, own, other])
    monkeypatch.setattr(gpu_status, "all_evidence", lambda: [shown(), shown("b", env={"capability": "120"})])
    assert gpu_status.fused_paths() == [("lora", "90"), ("mx", "120")]
    assert row_of("lora_own").startswith("| lora_own | csrc/cuda/lora/sm90.cu | 90a | yes | [2026-12-01 NVIDIA H200]")
    assert "evidence/a/summary.md): tests passed, sanitizers not run |" in row_of("lora_own")
    assert "evidence/b/summary.md): tests failed" in row_of("lora_shrink"), "of all architectures the last"
    assert row_of("mx_own") == "| mx_own | csrc/cuda/mx/sm120.cu | 120a | no | not run on a GPU | - |"
    assert "| lora | 90 | may be the default | 0.80x the portable path's time over 1 cases, a |" in gpu_status.status()
    assert "| mx | 120 | opt-in | no run on sm_120 |" in gpu_status.status()
    monkeypatch.setattr(gpu_status, "kernels", lambda: portable)
    assert "opt-in" not in gpu_status.status()


def test_suites_of_a_family():
    assert gpu_status.suites_of("lora") == ["lora"] and gpu_status.suites_of("mx") == ["mxfp4"]
    assert {name for f in sources.families() for name in gpu_status.suites_of(f)} >= {"lora", "multi_lora", "mxfp4"}


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="has no lines"):
        gpu_status.page_with("table", "# a page\n")


# ---------------------------------------------------------------------------------------------- README

UNITS = r"(?:\s?(?:[mµu]s|ns|s|min|minutes|seconds|[kMGT]i?B|[kMGT]?B/s|T?FLOP/s|tokens/s|%)|x|×)"
MEASURED = re.compile(rf"(?<![\w.*/-])\d[\d,.:]*{UNITS}(?![\w/])")
SIZE = re.compile(r"[kMGT]i?B$")
CELL = re.compile(r"[+-]?\d[\d.,]*(?:\s?[^\s\d].*)?")  # of a table, but its first column: begins with a number
COMMAND = re.compile(r"`(?:\w+=\S+ )*(?:python3?|make) [^`]+`|^(?:python3?|make) \S", re.M)
MACHINE = re.compile(r"\b\d+ cores\b|\b(?:A|B|H|L)\d{2,3}\b")
FOLDER = re.compile(r"bench/evidence/([\w-]+)")


def figures(block: str) -> list[str]:
    """What a paragraph, list, table or fenced block says was measured."""
    rows = [line.strip("| ").split("|") for line in block.splitlines() if line.startswith("|")]
    cells = [cell.strip() for _, *others in rows for cell in others]
    words = block if block.startswith("```") else re.sub(r"`[^`]*`", "", block)
    return MEASURED.findall(words) + [cell for cell in cells if CELL.fullmatch(cell)]


def unsourced(text: str) -> list[str]:
    """Faults of a page: paragraphs, tables and other blocks with figures that have no command and no machine beside them, which
    is in the block itself, in the one before or in the one after, of one section. A bench/evidence/ folder stands for both,
    "the same machine" for one that the page has named. Sizes need a command only."""
    faults, before = [], ""
    for section in re.split(r"^(?=## )", text, flags=re.M):
        blocks = [block for block in re.findall(r"```.*?```|(?:(?!\n\n|```).)+", section, re.S) if block.strip()]
        blocks = [block.strip("\n") for block in blocks]
        for i, block in enumerate(blocks):
            near = "\n\n".join(blocks[max(i - 1, 0) : i + 2])
            folders, found = FOLDER.findall(near), figures(block)
            missing = [f for f in FOLDER.findall(block) if not (gpu_status.EVIDENCE / f).is_dir()]
            faults += [f"bench/evidence/{f} does not exist" for f in missing]
            what = f"{blocks[0].splitlines()[0]}: {found[:1]} in {block[:60]!r}"
            earlier = before + "\n".join(blocks[:i])
            named = MACHINE.search(near) or ("same machine" in near and MACHINE.search(earlier))
            if found and not folders and not COMMAND.search(near):
                faults.append(f"{what} without the command that measured it")
            if found and not folders and not named and not all(SIZE.search(f) for f in found):
                faults.append(f"{what} without the machine")
        before += section
    return faults


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md"])
def test_no_measured_number_lacks_a_source(page):
    assert unsourced((ROOT / page).read_text()) == []


HEAD = "# x\n\n## Measured\n\n"
TABLE = "| case | ms |\n|---|---|\n| fp32 | 52.5 |\n"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("It takes 3.5 ms.", ["command", "machine"]),
        ("It is 2.1x faster, on 2 cores.", ["command"]),
        ("`make bench` says 98%.", ["machine"]),
        ("`python bench/run.py lora` on a CPU with 2 cores: 12 ms.", []),
        ("`make bench` on an H100: 3.0 TB/s.", []),
        ("The wheel has 5 MB.", ["command"]),
        ("`make wheel` leaves 5 MB.", []),
        (TABLE, ["command", "machine"]),
        ("`make bench` on the same machine\n\n" + TABLE, ["machine"]),
        ("On 2 cores.\n\nWords.\n\n`make bench` on the same machine\n\n" + TABLE, []),
        ("`make bench` on 2 cores\n\n" + TABLE + "\nWords.\n\nIt takes 3 ms.", ["command", "machine"]),
        ("`make bench` on 2 cores: 1 ms\n\nWords.\n\n" + TABLE, ["command", "machine"]),
        ("`make bench` on 2 cores:\n\n- 12 ms\n- 15 ms", []),
        ("```\nrun()  # 3.5 ms\n```", ["command", "machine"]),
        ("| 3.5 ms | 8 |\n|---|---|\n| 4.5 ms | few |", ["command", "machine"]),
        ("12 ms, see bench/evidence/2020-01-01-none-0.", ["does not exist"]),
        ("Ranks 0 to 512, tiles of 16 x 8, sm_90, fp32/bf16, 2^16, torch 2.11, 3 steps, `--limit 5s`.", []),
        ("| op | shape |\n|---|---|\n| a | [T, R] |", []),
    ],
)  # fmt: skip
def test_the_rule_for_numbers_can_fail(text, faults):
    found = unsourced(HEAD + text)
    assert len(found) == len(faults), found
    for fault, word in zip(found, faults, strict=True):
        assert word in fault


def test_evidence_stands_for_command_and_machine(evidence):
    folder = evidence()
    assert unsourced(f"{HEAD}12 ms, see bench/evidence/{folder.name}.") == []
