# SPDX-License-Identifier: Apache-2.0
"""`python -m lrkern [info [--json]]`: what is installed, what this machine has, which kernel each op takes here and by what.
`python -m lrkern selftest`: whether these kernels compute here what they should."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import lrkern
from lrkern import selftest, testing
from lrkern.ops import first_use
from lrkern.reference import OPS

# Every variable lrkern reads, and who reads it.
VARIABLES = {
    "LRKERN_CPU_ISA": "the highest instruction set CPU kernels may use: baseline, avx2 or avx512",
    "LRKERN_DISABLE": "ops, or all, that run as ATen's calls in place of their kernels",
    testing.FUSED: "1: ops take fused kernels of this GPU's architecture, which are not the default yet",
    first_use.QUIET: "1: nothing is said of a GPU model that has no run on record",
    "LRK_CUDA": "build: AUTO, ON or OFF",
    "LRK_CUDA_ARCHS": "build: CUDA architectures",
    "LRK_HOST": "build: ON or OFF, the module _host",
    "LRK_TORCH_DIR": "build: the torch to compile against",
    "MAX_JOBS": "build: parallel compilers",
    "LRK_TEST_FULL": "tests: more samples",
}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def host() -> tuple[str, dict[str, Any]]:
    """(the state of lrkern._host, the choices it knows)."""
    try:
        from lrkern import _host  # bound to one Python: a py3-none wheel has none
    except ImportError as error:
        return f"not available ({error})", {}
    return f"built for {sys.implementation.cache_tag}, {_host.build_info()['version']}", _host.choices()


def read(path: str) -> str:
    """A file of the system, or nothing where it has none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def cpu_name() -> str:
    names = (
        line.partition(":")[2].strip() for line in read("/proc/cpuinfo").splitlines() if line.startswith("model name")
    )
    return next(names, platform.processor() or platform.machine())


def device() -> dict[str, Any]:
    """The GPU torch sees and its driver, or why there is none."""
    if not torch.backends.cuda.is_built():
        return {"seen": False, "why": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"seen": False, "why": f"torch is built for CUDA {torch.version.cuda} but sees no usable GPU or driver"}
    properties = torch.cuda.get_device_properties(0)
    version = torch._C._cuda_getDriverVersion()
    return {
        "seen": True,
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": read("/sys/module/nvidia/version") or "(its version is not known)",
        "driver_cuda": f"{version // 1000}.{version % 1000 // 10}",
        "on_record": properties.name in first_use.GPUS,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def cuda_route(build: dict[str, Any], gpu: dict[str, Any]) -> tuple[str | None, str]:
    """(the code in _C.so this GPU would run, why)."""
    if not build["with_cuda"]:
        return None, "_C.so was built without nvcc; rebuild where nvcc is (LRK_CUDA=ON)"
    if not gpu["seen"]:
        return None, gpu["why"]
    major, minor = (int(n) for n in gpu["capability"].split("."))
    best = ""
    for arch in build["cuda_archs"].split():
        number, _, kind = arch.partition("-")
        built = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
        if kind != "virtual" and built[0] == major and built[1] <= minor:
            return f"sm_{number}", f"machine code for compute capability {gpu['capability']}"
        if kind != "real" and built <= (major, minor):
            best = f"compute_{number}"
    if best:
        return best, f"PTX compiled by the driver: no machine code for compute capability {gpu['capability']} in _C.so"
    return None, f"_C.so holds {build['cuda_archs']}, nothing that runs on compute capability {gpu['capability']}"


def collect() -> dict[str, Any]:
    build, gpu = json.loads(lrkern.ops.build_info()), device()
    code, why = cuda_route(build, gpu)
    cuda = {"implementation": f"CUDA kernel, {code}" if code else "none", "why": why}
    highest = f"the best this CPU has: {build['cpu_isa']}"
    if limit := os.environ.get("LRKERN_CPU_ISA"):
        highest = f"LRKERN_CPU_ISA={limit} allows no more than {build['cpu_isa']}"
    host_module, choices = host()
    cpu = {"implementation": f"CPU kernel, {build['cpu_isa']}", "why": highest}
    return {
        "lrkern": lrkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_abi_target": build["target_abi"],
        "peft": installed("peft"),
        "transformers": installed("transformers"),
        "library": str(lrkern.ops.LIBRARY),
        "compiler": build["compiler"],
        "host_module": host_module,
        "cuda_architectures": build["cuda_archs"].split(),
        "gpu": gpu,
        "cpu": cpu_name(),
        "cpu_isa": build["cpu_isa"],
        "threads": torch.get_num_threads(),
        "ops": {
            name: {"formula": op.formula, "cpu": cpu, "cuda": cuda, "disabled": name in lrkern.ops.disabled()}
            for name, op in OPS.items()
        },
        "choices": choices,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def heading(info: dict[str, Any]) -> None:
    """What a report begins with: versions and devices."""
    gpu = info["gpu"]
    if gpu["seen"]:
        seen = f"{gpu['count']} x {gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}, "
        seen += f"driver {gpu['driver']} for CUDA {gpu['driver_cuda']}, "
        seen += "a" if gpu["on_record"] else "no"
        seen += " run of this model is on record" + ("" if gpu["on_record"] else ": python -m lrkern selftest")
    else:
        seen = f"none: {gpu['why']}"
    rows = {
        "lrkern": f"{info['lrkern']}, stable ABI of torch {info['torch_abi_target']}, gcc {info['compiler']}",
        "library": info["library"],
        "_host": info["host_module"],
        "python": info["python"],
        "torch": info["torch"],
        "peft": info["peft"] or "not installed",
        "transformers": info["transformers"] or "not installed",
        "CUDA built": " ".join(info["cuda_architectures"]) or "no (CPU-only build)",
        "GPU": seen,
        "CPU": f"{info['cpu']}, {info['cpu_isa']}, {info['threads']} threads",
        "environment": " ".join(f"{k}={v}" for k, v in info["environment"].items()) or f"none of {' '.join(VARIABLES)}",
    }
    for name, text in rows.items():
        print(f"{name:<14}{text}")


def show(info: dict[str, Any]) -> None:
    heading(info)
    gpu = info["gpu"]
    print("\nops")
    one = next(iter(info["ops"].values()))  # all go one way
    for where, kind in (("the CPU", "cpu"), ("this GPU", "cuda")):
        if kind == "cpu" or gpu["seen"]:
            print(f"  on {where}: {one[kind]['implementation']} ({one[kind]['why']})")
    width = 2 + max(map(len, info["ops"]))
    for name, op in info["ops"].items():
        print(f"  {name:<{width}}{op['formula']}" + "  (disabled: ATen's calls)" * op["disabled"])
    print(f"\nchoices, each for a shape: lrkern._host.explain(name, T=..., ...); _host is {info['host_module']}")
    for name, choice in info["choices"].items():
        arguments = ", ".join(k if v is None else f"{k}={v}" for k, v in choice["arguments"].items())
        print(f"  {name}({arguments})", f"    {choice['rule']}", f"    {choice['numbers']}", sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lrkern", description="lrkern " + lrkern.__version__)
    parser.add_argument("--version", action="version", version=f"lrkern {lrkern.__version__}")
    commands = parser.add_subparsers(dest="command")
    command = commands.add_parser("info", help="versions, devices, and which kernel each op takes here (the default)")
    command.add_argument("--json", action="store_true", help="for programs and bug reports")
    command = commands.add_parser(
        "selftest",
        help="every op on every device here beside its reference, for a report; exit status 1 where one is wrong",
    )
    command.add_argument(
        "--quick", action="store_true", help="some samples of each op, one GPU of a model; meant for less than a minute"
    )
    command.add_argument("--json", type=Path, metavar="F", help="everything that was found, as a file")
    args = parser.parse_args()
    info = collect()
    try:
        status = 0
        if args.command == "selftest":
            heading(info)
            status = selftest.run(info, args.quick, args.json)
        elif args.command and args.json:
            print(json.dumps(info, indent=2))
        else:
            show(info)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads has read enough; Python would flush once more at its end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(args.command == "selftest")  # which has not come to its end


if __name__ == "__main__":
    sys.exit(main())
