# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU can show, in one command:  python tools/gpu.py --out DIR [--only FAMILY] [--parts P,...] [--resume]

Needs Python, torch >= 2.11 and pytest; nvcc where there is no build yet, compute-sanitizer where it is to check. Parts, in
this order: env, build, ptx (every wrapper of ptx.cuh against its definition), tests, sanitizer, ceilings, kernels (each
one's share of its roof), bench. Each is a process with a time limit; one that fails is reported and the rest goes on.
Parts run with LRKERN_FUSED=0. Those of families with kernels of this GPU's architecture alone run again with all, as fused:tests... and
fused:sanitizer...; kernels and bench time both.

    --only FAMILY   one family, within 5 minutes (not counting a build)
    --parts tests   only parts whose name begins so, such as tests or sanitizer:memcheck
    --resume        go on in DIR: what passed there is not run again
    --limit S       end within S seconds; --resume does the rest in the next call
    --tune          within 5 minutes: the registry's tests, then what tools/tune.py measures of the GPU; with --prepare, for that
    --prepare       only fills build/gpu/, to be carried to a machine without nvcc or cmake beside python/lrkern/_C.so

DIR gets env.txt, tests.txt, sanitizer.txt, bench.jsonl, summary.md and parts.json. What is worth keeping goes to
bench/evidence/ by `python tools/gpu_status.py --keep DIR`.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools import gpu_status, sources, tune
from tools.families import load
from tools.sources import INCLUDES, ROOT, tool

PYTHON = sys.executable
PACKAGE = ROOT / "python" / "lrkern"
PROBES = sources.KEPT.parent  # wrappers and planted, prebuilt or built here
OUTPUT_LIMIT = 1_500_000  # bytes one command may leave in a log
SM90 = ("wrappers_sm90", "cases_sm90")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_FOUND = 66
LEAST = 1.0  # seconds that a command is given where its part's time is up
LAYERS = ("tests/nn/test_nn_devices.py", "tests/peft/test_peft_devices.py", "tests/serving/test_serving_devices.py")
Outcome = tuple[str, str]  # (passed | failed | refused | skipped, note)


# ---------------------------------------------------------------------------------------------- running commands


def trim(path: Path, start: int, limit: int = OUTPUT_LIMIT) -> str:
    """What a command wrote to its log from byte `start` on; where that is too long the middle is cut out of the log."""
    data = path.read_bytes()
    head, text = data[:start], data[start:]
    if len(text) > limit:
        text = text[: limit // 2] + b"\n[... %d bytes left out ...]\n" % (len(text) - limit) + text[-limit // 2 :]
        path.write_bytes(head + text)
    return text.decode(errors="replace")


def stop(process: subprocess.Popen) -> None:
    """Ends the command and what it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(5)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@dataclass
class Session:
    out: Path
    families: list[str]
    only: bool = False
    rehearse: bool = False  # on the CPU, without a GPU's tools: shows faults of this script
    device: str = "cuda"  # cpu when rehearsing, "" where there is no CUDA device
    capability: str = ""  # of the GPU: "90"
    fused: bool = False  # whether ops take the kernels of its architecture alone
    part: str = ""
    deadline: float = 0.0  # of the part
    probes: list[str] = field(default_factory=list)  # built by this call

    def run(self, *command: object, log: str, **env: str) -> tuple[int | None, str]:
        """(exit status, or None where time ran out; output). The output goes to the log as it comes."""
        path, words = self.out / log, [str(c) for c in command]
        with path.open("ab") as f:
            f.write(f"\n== {self.part}: {' '.join(words)}\n".encode())
            start = f.tell()
            f.flush()
            process = subprocess.Popen(
                words, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT / "python"), "PYTHONUNBUFFERED": "1",
                     "LRKERN_FUSED": "all" if self.fused else "0", **env},
            )  # fmt: skip
            try:
                code = process.wait(max(LEAST, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            except KeyboardInterrupt:
                stop(process)
                raise
            stop(process)  # what it may have left running
        return code, trim(path, start)

    @property
    def interpreter(self) -> str:
        return PYTHON

    def python(self, *command: object, log: str, **env: str) -> tuple[int | None, str]:
        return self.run(PYTHON, *command, log=log, **env)

    def program(self, name: str, log: str, also: Iterable[str] = ()) -> str:
        """A program of tests/emulator/ over the sources `also`: for the device, or emulated in a rehearsal; "" where it cannot
        be built."""
        if not self.rehearse:
            return probe(self, name, log, also)
        build = f"import build; print(build.executable({name!r}, {[f'tests/emulator/{name}.cu', *also]!r}, 'plain'))"
        path = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests" / "emulator")])
        code, text = self.python("-c", build, log=log, PYTHONPATH=path)
        return text.strip().splitlines()[-1] if code == 0 else ""

    plain = staticmethod(lambda code, text, note="": plain(code, text, note))

    def rows(self, rows: list[dict]) -> None:
        """Replaces the part's rows in bench.jsonl."""
        path = self.out / "bench.jsonl"
        others = [r for r in gpu_status.rows_of(path) if r["part"] != self.part]
        path.write_text("".join(json.dumps(r) + "\n" for r in others + [{"part": self.part, **r} for r in rows]))


def plain(code: int | None, text: str, note: str = "") -> Outcome:
    if code == 0:
        return "passed", note
    lines = [line for line in text.splitlines() if line.strip()]
    return "failed", "ran out of time" if code is None else f"exit status {code}: {lines[-1] if lines else ''}"[:300]


# ---------------------------------------------------------------------------------------------- env and build

FACTS = """
import json, platform, torch
out = {"python": platform.python_version(), "torch": torch.__version__, "torch cuda": str(torch.version.cuda), "gpus": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        out["gpus"].append([p.name, f"{p.major}{p.minor}", p.total_memory, p.multi_processor_count])
print("FACTS" + json.dumps(out))
"""


def said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return ""


def facts(session: Session) -> dict:
    _, text = session.python("-c", FACTS, log="env.log")
    (session.out / "env.log").unlink()
    found = re.search(r"FACTS(.*)", text)
    if not found:
        raise RuntimeError(f"{PYTHON} does not import torch: {text.strip()[-300:]}")
    return json.loads(found[1])


def env(session: Session, known: dict) -> Outcome:
    gpu, capability, memory, processors = known["gpus"][0] if known["gpus"] else ("none", "", 0, 0)
    commit = said("git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*")
    lines = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "commit": os.environ.get("LRK_COMMIT") or commit or "unknown",  # a copy of the tree may come without .git
        "gpu": gpu,
        "gpus": str(len(known["gpus"])),
        "capability": capability,
        "memory": f"{memory / 2**30:.1f} GiB, {processors} multiprocessors",
        "driver": said("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"),
        "nvcc": " ".join(re.findall(r"release \S+", said(tool("nvcc"), "--version"))),
        "compute-sanitizer": " ".join(re.findall(r"[Vv]ersion \S+", said(tool("compute-sanitizer"), "--version"))),
        "system": " ".join(os.uname()[i] for i in (0, 2, 4)) + f", {os.cpu_count()} cores",
        "rehearsal": str(session.rehearse),
        **{k: known[k] for k in ("python", "torch", "torch cuda")},
        **{f"source {family}": sources.digest(family) for family in session.families},
    }  # fmt: skip
    (session.out / "env.txt").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    return "passed", f"{gpu}, torch {known['torch']}"


def covers(archs: str, capability: str) -> bool:
    """Do architectures as CMake writes them ("80-real 90-virtual") hold code for a device of this capability?"""
    for arch in archs.split():
        number, kind = re.fullmatch(r"(\d+)[af]?(?:-(\w+))?", arch).groups()
        same = number[:-1] == capability[:-1] and int(number) <= int(capability)
        if (kind != "virtual" and same) or (kind != "real" and int(number) <= int(capability)):
            return True
    return False


def build(session: Session, known: dict) -> Outcome:
    """Uses the _C.so that is there if it holds code for this device, else builds; _host for this Python where it can."""
    notes = []
    capability = known["gpus"][0][1] if known["gpus"] else ""
    ask = "import lrkern.ops; print(lrkern.ops.build_info())"
    code, text = session.python("-c", ask, log="tests.txt")
    info = json.loads(text.strip().splitlines()[-1]) if code == 0 else {}
    host = session.python("-c", "import lrkern._host", log="tests.txt")[0] == 0
    fits = bool(info) and (session.rehearse or covers(info["cuda_archs"], capability))
    can_host = importlib.util.find_spec("pybind11") is not None and bool(tool("cmake"))
    if not fits:
        if not tool("nvcc"):
            return "failed", f"no _C.so with code for sm_{capability}, and no nvcc to build one"
        env = {"LRK_CUDA": "ON", "LRK_CUDA_ARCHS": f"{capability}-real", "LRK_HOST": "ON" if can_host else "OFF",
               "PATH": f"{Path(tool('nvcc')).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
        code, text = session.python("setup.py", "-q", "build_ext", "--inplace", log="tests.txt", **env)
        if code != 0:
            return plain(code, text)
        notes.append(f"built for sm_{capability}")
    else:
        notes.append(f"_C.so as found, for {info['cuda_archs'] or 'the CPU'}")
        if not host and can_host:
            host = build_host(session)
    if not host and session.python("-c", "import lrkern._host", log="tests.txt")[0] != 0:
        notes.append("no _host for this Python, its tests are skipped")
    return "passed", "; ".join(notes)


def build_host(session: Session) -> bool:
    folder = ROOT / "build" / "gpu-host"
    say = lambda code: session.python("-c", code, log="tests.txt")[1].strip().splitlines()[-1]
    options = {
        "TORCH_DIR": say("import torch, os; print(os.path.dirname(torch.__file__))"),
        "pybind11_DIR": say("import pybind11; print(pybind11.get_cmake_dir())"),
        "Python_EXECUTABLE": PYTHON,
        "LRK_CUDA": "OFF",
    }
    settings = [f"-D{k}={v}" for k, v in options.items()]
    if ninja := tool("ninja"):
        settings += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (["-S", ROOT, "-B", folder, *settings], ["--build", folder, "--target", "_host"]):
        if session.run(tool("cmake"), *command, log="tests.txt")[0] != 0:
            return False
    for library in folder.glob("_host*.so"):
        shutil.copy(library, PACKAGE)
    return True


# ---------------------------------------------------------------------------------------------- ptx and tests


def probe(session: Session, name: str, log: str, also: Iterable[str] = ()) -> str:
    """A program of tests/emulator/, built where there is an nvcc, else as it was carried here; "" if there is neither."""
    program, nvcc = PROBES / name, tool("nvcc")
    if nvcc and name not in session.probes:
        PROBES.mkdir(parents=True, exist_ok=True)
        program.unlink(missing_ok=True)
        targets = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
        if name.endswith("_sm90"):
            targets = ["-gencode=arch=compute_90a,code=sm_90a"]
        flags = ["-O2", "--expt-relaxed-constexpr", "-cudart", "static", *(f"-I{folder}" for folder in INCLUDES)]
        files = [f"tests/emulator/{name}.cu", *also]
        session.run(nvcc, sources.standard(), *flags, *targets, *files, "-o", program, log=log)
        session.probes.append(name)
    return str(program) if program.exists() else ""


def ptx(session: Session, known: dict) -> Outcome:
    program = session.program("wrappers", "tests.txt")
    if not program:
        return "skipped", f"no nvcc and no {PROBES / 'wrappers'}"
    code, text = session.python("tests/emulator/wrapper_words.py", program, log="tests.txt")
    return plain(code, text, f"{len(re.findall(r' ok$', text, re.M))} wrappers")


def ptx_sm90(session: Session, known: dict) -> Outcome:
    """wgmma in every form, copies of boxes, clusters and launches that overlap, then a small GEMM of them, alone and in pairs."""
    if not session.rehearse and known["gpus"][0][1] != "90":
        return "skipped", f"code of sm_90a alone, this GPU is of {known['gpus'][0][1]}"
    forms = 0
    for name in SM90:
        program = session.program(name, "tests.txt")
        if not program:
            return "skipped", f"no nvcc and no {PROBES / name}"
        code, text = session.run(program, log="tests.txt")
        if code != 0:
            return plain(code, text)
        forms += len(re.findall(r" ok$", text, re.M))
    return "passed", f"{forms} forms, and a GEMM"


def pytest_part(files: Iterable[str], select: str, full: bool = False) -> Callable[[Session, dict], Outcome]:
    """full: with what `make test-full` adds, where all families run."""

    def run(session: Session, known: dict) -> Outcome:
        if importlib.util.find_spec("pytest") is None:
            return "skipped", "no pytest"
        options = ["-p", "no:cacheprovider", "-rsf", "--tb=short", "--maxfail=30", *files, "-k", select]
        more = {"LRK_TEST_FULL": "1"} if full and not (session.only or session.rehearse) else {}
        return pytest_verdict(*session.python("-m", "pytest", *options, log="tests.txt", **more))

    return run


def pytest_verdict(code: int | None, text: str) -> Outcome:
    """Of a pytest run. Tests that are skipped because they see no GPU code show nothing, however many others pass."""
    counts = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error|deselected)[^=\n]*) in [\d.]+", text, re.M)
    note = counts[-1] if counts else ""
    if blind := re.search(r"^SKIPPED .*: (no CUDA device|this _C.so has no CUDA code)", text, re.M):
        return "failed", f"{blind[1]}: {note}"
    if code == 0 and " passed" not in note:
        return "failed", f"nothing ran: {note}"
    status, why = plain(code, text)
    return status, note or why


# ---------------------------------------------------------------------------------------------- sanitizer


ERROR = r"========= (?:(?:ERROR|Error|WARN\w*|Warning): Race|Invalid|Misaligned|Barrier error|Uninitialized|Divergent|Potential)"


def device_errors(text: str) -> tuple[int, int, str]:
    """(errors in our kernels, errors elsewhere, the first line of the first of ours) in compute-sanitizer's report."""
    found = [block for block in re.split(r"^(?=={9} \S)", text, flags=re.M) if re.match(ERROR, block)]
    ours = [block for block in found if re.search(r"lrk(::|\d)", block.partition("host backtrace")[0])]
    return len(ours), len(found) - len(ours), ours[0].splitlines()[0][10:] if ours else ""


def verdict(code: int | None, text: str) -> Outcome:
    """Of one compute-sanitizer run over the cases."""
    ours, others, first = device_errors(text)
    if ours:
        return "failed", f"{ours} errors in our kernels, first: {first}"
    if code is None:
        return "failed", "ran out of time"
    summary = re.search(r"^========= (?:ERROR|RACECHECK) SUMMARY: (.*)$", text, re.M)
    if not summary:
        lines = [line for line in text.splitlines() if line.startswith("=========") and "COMPUTE-SANITIZER" not in line]
        return "refused", (lines or text.strip().splitlines() or ["no output"])[-1].strip("= ")[:200]
    cases = re.search(r"^cases: (\d+ of \d+)", text, re.M)
    if not cases:
        return "failed", f"the cases did not end: {summary[1]}"
    if code not in (0, SANITIZER_FOUND):
        return "failed", f"exit status {code}: {summary[1]}"
    return "passed", f"{cases[1]} cases, {summary[1]}" + (f" ({others} in kernels that are not ours)" if others else "")


def sanitizer(check: str) -> Callable[[Session, dict], Outcome]:
    def run(session: Session, known: dict) -> Outcome:
        cases = ["tools/gpu_kernels.py", "cases", *session.families]
        if session.rehearse:
            code, text = session.python(*cases, "--device", "emulated", log="sanitizer.txt")
            return plain(code, text, text.strip().rpartition("\n")[2])
        program = tool("compute-sanitizer")
        if not program:
            return "skipped", "no compute-sanitizer"
        options = {"tool": check, "error-exitcode": SANITIZER_FOUND, "print-limit": 20, "show-backtrace": "device",
                   "report-api-errors": "no", "launch-timeout": 0} | ({"padding": 128} if check == "memcheck" else {})  # fmt: skip
        command = [program, *(word for key, value in options.items() for word in (f"--{key}", value))]
        note = ""
        if planted := probe(session, "planted", "sanitizer.txt"):
            code, text = session.run(*command, planted, check, log="sanitizer.txt")
            if not device_errors(text)[0]:
                return "refused", f"it does not see a planted error: {verdict(code, text)[1]}"
            note = ", sees a planted error"
        # initcheck has to see who initialises what, so it watches every kernel.
        if check != "initcheck":
            command += ["--kernel-name", "kernel_substring=lrk"]
        seconds = (session.deadline - time.monotonic()) * 0.5  # the rest is start-up and the last sample's overrun
        cases += ["--seconds", f"{seconds:.0f}"]
        status, text = verdict(*session.run(*command, PYTHON, *cases, log="sanitizer.txt"))
        return status, text + note

    return run


# ---------------------------------------------------------------------------------------------- figures


def json_part(what: str) -> Callable[[Session, dict], Outcome]:
    def run(session: Session, known: dict) -> Outcome:
        command = ["tools/gpu_kernels.py", what, *(session.families if what == "time" else []), "--device"]
        code, text = session.python(*command, session.device, log="bench.log")
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        session.rows(rows)
        if what == "ceilings":
            note = ", ".join(f"{r['case']} {r['per_second'] / 1e12:.3g} T/s" for r in rows)
        else:
            note = ", ".join(f"{r['kernel']} {r['dtype']} {r['of_roof']:.0%}" for r in rows)
        return plain(code, text, note)

    return run


def bench(suite: str) -> Callable[[Session, dict], Outcome]:
    def run(session: Session, known: dict) -> Outcome:
        ops = [op for family in session.families for op in gpu_status.ops_of(family)] if suite == "op" else []
        file = session.out / "rows.json"
        command = ["bench/run.py", suite, *(ops if session.only else ()), "--device", session.device, "--json", file]
        if session.only or session.rehearse or suite != "op":
            command.append("--quick")
        if session.rehearse:
            command += ["--case", f"method={ops[0]} " if ops else "T=1 "]
        code, text = session.python(*command, log="bench.log")
        rows = gpu_status.rows_of(file)
        file.unlink(missing_ok=True)
        session.rows(rows)
        return plain(code, text, f"{len(rows)} rows, {sum(r.get('noisy', False) for r in rows)} noisy")

    return run


def suites(families: list[str]) -> list[str]:
    """Those of the families, and `op`, which times the ops of every one."""
    return [*(name for family in families for name in gpu_status.suites_of(family)), "op"]


# ---------------------------------------------------------------------------------------------- the parts

Part = tuple[str, int, Callable[[Session, dict], Outcome]]  # name, seconds it may take, what it does


def parts_of(session: Session) -> list[Part]:
    limit = lambda whole, only: only if session.only else whole
    select = lambda real, rehearsed: rehearsed if session.rehearse else real
    ops = [op for family in session.families for op in gpu_status.ops_of(family)]
    some = session.only or session.fused
    registry = select(f"cuda and ({' or '.join(ops)})" if some else "cuda", "odd and cpu and float32")
    beyond = {file: few for family in session.families for file, few in load(family).TESTS.items()}
    families = select("cuda", " or ".join(f"({few})" for few in beyond.values()))
    device, library = ("test_cuda", "test_devices"), ("test_build", "test_host")
    device = pytest_part([f"tests/ops/{name}.py" for name in device], select("not (cpu or emulated)", "cpu and odd"))
    again = [] if session.fused else fused(session)
    return [
        ("env", 60, env),
        ("build", 500, build),
        ("ptx", limit(120, 40), ptx),
        ("ptx_sm90", limit(120, 40), ptx_sm90),
        ("tests:registry", limit(400, 70), pytest_part(["tests/ops/test_ops.py"], registry)),
        *([("tests:families", limit(580, 90), pytest_part(beyond, families, full=True))] if beyond else []),
        ("tests:device", limit(300, 50), device),
        ("tests:layers", limit(200, 60), pytest_part(LAYERS, select("not emulated", "emulated and float32"))),
        ("tests:library", limit(120, 40), pytest_part([f"tests/csrc/{name}.py" for name in library], "")),
        *(part for part in again if not part[0].startswith("fused:sanitizer")),
        *((f"sanitizer:{check}", limit(200, 40), sanitizer(check)) for check in TOOLS),
        *(part for part in again if part[0].startswith("fused:sanitizer")),
        ("ceilings", limit(60, 20), json_part("ceilings")),
        ("kernels", limit(120, 30), json_part("time")),
        *((f"bench:{name}", limit(400, 60), bench(name)) for name in suites(session.families)),
    ]


def fused(session: Session) -> list[Part]:
    """What families with kernels of this GPU's architecture run with them."""
    families = [f for f in session.families if (f, session.capability) in gpu_status.fused_paths()]
    changed = lambda session: replace(session, families=families, fused=True)
    with_it = lambda run: lambda session, known: run(changed(session), known)
    parts = parts_of(changed(session)) if families else []
    chosen = ("tests:registry", "tests:families", "tests:layers", "sanitizer:")
    return [(f"fused:{name}", seconds, with_it(run)) for name, seconds, run in parts if name.startswith(chosen)]


def tuning(session: Session) -> list[Part]:
    """Correctness first, and for a build."""
    first = [part for part in parts_of(session) if part[0] in ("env", "build", "ptx", "tests:registry")]
    return [
        (name, min(seconds, 70) if name.startswith("tests") else seconds, run) for name, seconds, run in first
    ] + tune.PARTS


def markdown(head: str, rows: list[list[str]]) -> list[str]:
    """A table, or nothing where there are no rows."""
    lines = [head, "|" + "---|" * head.count(" | ") + "---|", *(f"| {' | '.join(r)} |" for r in rows)]
    return ["", *lines] if rows else []


def summary(session: Session, parts: dict[str, dict]) -> str:
    rows = gpu_status.rows_of(session.out / "bench.jsonl")
    number = lambda row, key, form: format(row[key], form) if row.get(key) else ""
    outcomes = [[n, p["status"], f"{p['seconds']:.0f}", p["note"].replace("|", "/")] for n, p in parts.items()]
    kernels, shapes, timed = [], [], []
    for r in rows:
        figures = [number(r, "p50_ms", ".4g"), number(r, "roof_ms", ".4g"), number(r, "of_roof", ".0%")]
        if r["suite"] == "kernel":
            kernels.append([r["kernel"], r["case"], r["dtype"], *figures])
        elif r["suite"] == "shape":
            share = figures[0], number(r, "predicted_ms", ".4g")
            shapes.append([r["kernel"], r["case"], *share, r.get("bound_by", "")])
        elif "provider" in r:
            name = r["provider"] + " (noisy)" * bool(r.get("noisy"))
            beside = number(r, "extra_over_base", "+.1%"), number(r, "adapter_ms", ".4g")
            timed.append([r["suite"], r["case"], r["dtype"], name, *figures, *beside])
    return "\n".join(
        [
            "# One run on a GPU\n\n```",
            (session.out / "env.txt").read_text() + "```",
            *markdown("| part | outcome | seconds | note |", outcomes),
            *markdown("| kernel | case | dtype | ms | roof ms | share of roofline |", kernels),
            *markdown("| call | case (bf16) | ms | predicted ms | bound by, predicted |", shapes),
            *markdown(
                "| suite | case | dtype | provider | ms | roof ms | share of roofline | over base | adapter ms |", timed
            ),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", choices=sources.families(), metavar="FAMILY")
    parser.add_argument("--parts", default="", metavar="P,...")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--limit", type=float, metavar="S")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    begin = time.monotonic()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in (*gpu_status.FILES, "bench.log"):
            (out / name).unlink(missing_ok=True)
    session = Session(out, [args.only] if args.only else sources.families(), bool(args.only), args.rehearse)
    session.part, session.deadline = "env", begin + 60
    if args.prepare:
        built = [probe(session, name, "tests.txt") for name in ("wrappers", "planted", *SM90)]
        if args.tune:
            session.deadline = begin + 900
            built.append(probe(session, "tune", "bench.log", tune.SOURCES))
            tune.prepare(session.families)
        (PROBES / sources.KEPT.name).write_text(sources.printed())
        print("\n".join(filter(None, built)) or f"nothing built, see {out / 'tests.txt'}")
        return not all(built)
    known = facts(session)
    session.device = "cpu" if args.rehearse else "cuda" if known["gpus"] else ""
    session.capability = known["gpus"][0][1] if known["gpus"] else ""

    state = out / "parts.json"
    parts: dict[str, dict] = json.loads(state.read_text()) if state.exists() else {}
    wanted = [p for p in args.parts.split(",") if p]
    left: list[str] = []
    for name, seconds, run in tuning(session) if args.tune else parts_of(session):
        if wanted and name != "env" and not name.startswith(tuple(wanted)):
            continue
        if parts.get(name, {}).get("status") == "passed" and name != "env":
            print(f"{name:<20} passed before", flush=True)
            continue
        allowed = args.limit or (285 if session.only or args.tune else float("inf"))
        start = time.monotonic()
        remaining = allowed - (start - begin)
        if remaining < 15:
            left.append(name)
            continue
        session.part, session.deadline = name, start + min(seconds, remaining)
        print(f"{name:<20} ", end="", flush=True)
        try:
            status, note = run(session, known) if session.device or name == "env" else ("skipped", "no CUDA device")
        except Exception as error:  # a fault of this script must not cost the parts that follow
            status, note = "failed", f"{type(error).__name__}: {error}"[:300]
        took = time.monotonic() - start
        if name == "build" and not args.limit:
            begin += took
        parts[name] = {"status": status, "seconds": round(took, 1), "note": note}
        print(f"{status:<8}{took:6.0f} s  {note}", flush=True)
        state.write_text(json.dumps(parts, indent=1) + "\n")
        (out / "summary.md").write_text(summary(session, parts))
    for name in ("tests.txt", "sanitizer.txt", "bench.jsonl"):
        (out / name).touch()

    print()
    for status in ("passed", "failed", "refused", "skipped"):
        if names := [n for n, p in parts.items() if p["status"] == status]:
            print(f"{status}: {', '.join(names)}")
    if left:
        print(f"left for --resume: {', '.join(left)}")
    if not session.device:
        print("no CUDA device: nothing was shown")
    print(f"see {out / 'summary.md'}")
    return any(p["status"] == "failed" for p in parts.values())


if __name__ == "__main__":
    sys.exit(main())
