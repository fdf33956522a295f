# SPDX-License-Identifier: Apache-2.0
"""Compiles CUDA sources with g++ against the emulator. Objects are cached in build/emulator by the hash of what they read.

Variants:
  plain      -O2, for speed and for numbers; the shared library of the "emulated" device kind
  sanitized  AddressSanitizer and UBSan; executables only, run as child processes
  tracked    every load and store of a kernel is checked for races and unwritten memory (track.cpp); executables only
  contracted plain, with every a * b + c that nvcc would contract made one fused operation
  traffic    every load and store is counted, on a sample of blocks, and nothing computed (traffic.cpp); a library of the ops

python tests/emulator/build.py extension | all     builds the shared library, and what else the tests run
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.sources import ROOT, Source, sources, standard

HERE = Path(__file__).resolve().parent.relative_to(ROOT)  # commands run in ROOT, so that reports name relative paths
OUT = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "g++")

# The emulator's casts between element types would break strict aliasing, as nvcc allows.
COMMON = [standard(), "-fPIC", f"-ffile-prefix-map={ROOT}=.", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLRK_EMULATE",
          "-Icsrc", "-Icsrc/cuda", f"-I{HERE}"]  # fmt: skip
KERNEL = {
    "plain": ["-O2", "-g1", "-ftls-model=initial-exec"],
    "sanitized": [
        "-O1",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize=null",
        "-fno-sanitize-recover=all",
    ],
    # The instrumentation alone is wanted; hooks.cpp answers its calls and no libtsan is linked.
    "tracked": ["-O1", "-g", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
    # A vector is moved in one access, as nvcc moves it, not element by element (-fno-tree-sra); and -O2, as a value that a call
    # returns into memory is a store that no hook is called for.
    "traffic": ["-O2", "-g", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fno-tree-sra"],
}
KERNEL["contracted"] = [*KERNEL["plain"], "-mfma", "-ffp-contract=fast"]
RUNTIME = {
    "plain": ["-O3", "-g1", "-ftls-model=initial-exec"],
    "contracted": ["-O3", "-g1", "-ftls-model=initial-exec"],
    "sanitized": ["-O2", "-g", "-fsanitize=address"],
    "tracked": ["-O2", "-g1"],
    "traffic": ["-O2", "-g1"],
}
LINK = {
    "plain": [],
    "contracted": [],
    "sanitized": ["-fsanitize=address,undefined"],
    "tracked": ["-ldl"],
    "traffic": ["-ldl"],
}


def runtime_of(variant: str) -> list[Path]:
    followers = ("traffic.cpp", "traffic_text.cpp") if variant == "traffic" else ("track.cpp",)
    return [
        HERE / name for name in ("emulator.cpp", "cluster.cpp", "warp_ops.cpp", "hopper.cpp", "hooks.cpp", *followers)
    ]


@cache
def why_not(variant: str = "plain") -> str | None:
    """The reason why nothing can be emulated here, or None."""
    if not shutil.which(CXX):
        return f"no {CXX} on PATH"
    if variant == "sanitized":
        for library in ("libasan.so", "libubsan.so"):
            said = subprocess.run([CXX, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
            if not os.path.isabs(said):  # the bare name comes back where there is none
                return f"{CXX} has no {library}"
    if variant == "contracted" and " fma " not in Path("/proc/cpuinfo").read_text():
        return "this CPU has no fused multiply-add"
    return None


@cache
def compiler() -> str:
    return subprocess.run([CXX, "-v"], capture_output=True, text=True).stderr


@contextmanager
def locked():
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def run(command):
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


@cache
def digest(path: Path) -> str:
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()


def compile_object(source: Path, flags: list[str]) -> Path:
    key = hashlib.sha256(json.dumps([str(source), flags, compiler()]).encode()).hexdigest()[:16]
    obj = OUT / f"{source.stem}-{key}.o"
    state = obj.with_suffix(".json")
    if obj.exists() and state.exists():
        seen = json.loads(state.read_text())
        if all((ROOT / p).exists() and digest(Path(p)) == h for p, h in seen.items()):
            return obj
    state.unlink(missing_ok=True)
    depfile = obj.with_suffix(".d")
    run([CXX, *COMMON, *flags, "-MMD", "-MF", depfile, "-x", "c++", "-c", source, "-o", obj])
    words = depfile.read_text().replace("\\\n", " ").split()[1:]
    inside = {w for w in words if not Path(w).is_absolute() or Path(w).is_relative_to(ROOT)}
    state.write_text(json.dumps({p: digest(Path(p)) for p in sorted(inside)}))
    return obj


def link(name: str, objects: list[Path], flags: list[str]) -> Path:
    stamp = [(o.name, o.stat().st_mtime_ns) for o in objects]
    key = hashlib.sha256(json.dumps([stamp, flags, compiler()]).encode()).hexdigest()[:16]
    out, state = OUT / name, OUT / f"{name}.link"
    if not (out.exists() and state.exists() and state.read_text() == key):
        run([CXX, *objects, *flags, "-lpthread", "-o", out])
        state.write_text(key)
    return out


def compile_all(units: list[tuple[Path, list[str]]]) -> list[Path]:
    digest.cache_clear()
    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", min(2, os.cpu_count() or 1)))) as pool:
        return list(pool.map(lambda unit: compile_object(*unit), units))


def executable(name: str, sources: list[str | Path], variant: str, runtime: tuple[str, ...] = ()) -> Path:
    """build/emulator/<name>-<variant>: .cu sources take the variant's kernel flags, .cpp its runtime flags."""
    units = [(Path(s), (KERNEL if str(s).endswith(".cu") else RUNTIME)[variant]) for s in sources]
    units += [(s, [*RUNTIME[variant], *runtime]) for s in runtime_of(variant)]
    with locked():
        return link(f"{name}-{variant}", compile_all(units), LINK[variant])


def counted(name: str, sources: list[str | Path]) -> Path:
    """build/emulator/<name>-traffic.so, for ctypes."""
    units = [(Path(s), KERNEL["traffic"]) for s in sources]
    units += [(s, RUNTIME["traffic"]) for s in runtime_of("traffic")]
    with locked():
        return link(f"{name}-traffic.so", compile_all(units), ["-shared", "-Wl,-Bsymbolic", *LINK["traffic"]])


def portable(*kinds: str) -> list[Source]:
    """The sources, of these kinds alone where any are given, that the emulator runs: those of any GPU, and of sm_90a."""
    return [s for s in sources() if s.arch in ("", "90") and s.kind in (kinds or s.kind)]


def families() -> list[str]:
    return sorted({s.family for s in portable("cuda")} - {""})


def sources_of(family: str) -> list[Path]:
    """What a family's launchers are made of."""
    return [s.path for s in portable("policy", "cuda") if s.family in ("", family)]


def params_program(family: str, variant: str) -> Path:
    """<family>_params.cpp: every launcher of the family's contract, on random and on odd params."""
    return executable(f"{family}_params", [HERE / f"{family}_params.cpp", *sources_of(family)], variant)


NAMESPACE = {"plain": "lrkern_emulated", "contracted": "lrkern_emulated", "traffic": "lrkern_traffic"}
VARIANT = os.environ.get("LRK_EMULATOR", "plain")  # of the device kind `emulated`: plain, or contracted


def extension(variant: str = VARIANT) -> Path:
    """The glue over emulated kernels: registers torch.ops.lrkern_emulated, or lrkern_traffic, for CPU tensors."""
    spec = importlib.util.find_spec("torch")
    torch = Path(spec.origin).parent
    flags = {
        "cuda": KERNEL[variant],
        "policy": ["-O2"],
        # Only *_cuda are called; the CPU entry points are there to link.
        "cpu": ["-O2", "-ffp-contract=fast", "-fno-math-errno", "-DLRK_ISA=baseline", "-DLRK_ISA_ENTRY"],
        "ops": ["-O2", f"-isystem{torch}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA",
                f"-DLRK_NAMESPACE={NAMESPACE[variant]}"],
    }  # fmt: skip
    units = [(s.path, flags[s.kind]) for s in portable()]
    units += [(s, RUNTIME[variant]) for s in runtime_of(variant)]
    # Both this library and _C.so define lrk::*; neither may reach into the other.
    shared = ["-shared", "-Wl,-Bsymbolic", f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    with locked():
        name = NAMESPACE[variant] + ("-contracted" if variant == "contracted" else "")
        return link(f"{name}.so", compile_all(units), [*shared, *LINK[variant]])


def launched() -> set[tuple[str, int, int]]:
    """(kernel, threads, bytes of shared memory) of every launch since the last call."""
    lines = (line.split() for line in library().lrk_emulator_launched().decode().splitlines())
    return {(name, int(threads), int(shared)) for name, threads, shared in lines}


@cache
def library() -> ctypes.CDLL:
    """The extension, loaded; its lrk_emulator_* functions are attributes."""
    import torch

    path = str(extension())
    torch.ops.load_library(path)
    lib = ctypes.CDLL(path)
    lib.lrk_emulator_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    lib.lrk_emulator_get.argtypes = [ctypes.c_char_p]
    lib.lrk_emulator_get.restype = ctypes.c_int64
    lib.lrk_emulator_report.restype = lib.lrk_emulator_launched.restype = ctypes.c_char_p
    return lib


def ops():
    """torch.ops.lrkern_emulated, built and loaded."""
    import torch

    library()
    return torch.ops.lrkern_emulated


@contextmanager
def setting(name: str, value: int):
    """A setting of emulator.h for the ops of the extension, such as setting("schedule", 3)."""
    lib = library()
    before = lib.lrk_emulator_get(name.encode())
    if lib.lrk_emulator_set(name.encode(), value):
        raise KeyError(name)
    try:
        yield
    finally:
        lib.lrk_emulator_set(name.encode(), before)


def execute(program: Path, *args, **env) -> subprocess.CompletedProcess:
    """Runs an executable of ours in ROOT with LRK_EMU_* from env; output as text."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:color=never",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1:color=never",
    }
    return subprocess.run(
        [str(program), *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **options, **{k: str(v) for k, v in env.items()}},
    )  # fmt: skip


def cute_includes() -> tuple[list[str], str | None]:
    """Include flags of cute and of the CUDA headers it leans on; or none, and the reason."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        return [], "the wheel nvidia-cutlass is not installed"
    cute = Path(spec.origin).parent / "source" / "include"
    if nvcc := shutil.which("nvcc"):
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
        top = next((line.split("=", 1)[1].strip() for line in said.splitlines() if line.startswith("#$ TOP=")), "")
        cuda = Path(top) / "include"
        if (cuda / "cuda_runtime_api.h").exists():
            return [f"-isystem{cute}", f"-isystem{cuda}", f"-isystem{cuda / 'cccl'}"], None
    return [], "no CUDA headers (nvcc is not on PATH)"


if __name__ == "__main__":
    if sys.argv[1:] not in (["extension"], ["all"]):
        sys.exit(__doc__)
    if not why_not():
        print(extension())
    for variant in KERNEL if sys.argv[1] == "all" else ():  # the programs that take long
        if variant in NAMESPACE:
            print(extension(variant))
        if variant != "traffic" and not why_not(variant):
            print(*(params_program(family, variant) for family in families()), sep="\n")
