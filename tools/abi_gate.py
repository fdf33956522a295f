# SPDX-License-Identifier: Apache-2.0
"""Is _C.so what docs/design.md §3 promises? One file for every torch >= 2.11, Python and x86-64 CPU, with CUDA or without.

python tools/abi_gate.py [_C.so]: prints what was found, one line per fault, exit status 1 if there is any.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = (2, 11)


def output(*command) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def symbol_faults(library: Path) -> list[str]:
    """What nm and readelf show; needs binutils only."""
    faults = []
    for line in output("nm", "-D", "--undefined-only", library).splitlines():
        kind, name = line.split()[-2:]
        name, _, version = name.partition("@")
        if re.match(r"_?Py[A-Z_]", name):
            faults.append(f"{name}: a symbol of libpython ties the file to one Python")
        elif name.startswith("_Z") and not version:
            plain = output("c++filt", name).strip() if shutil.which("c++filt") else name
            faults.append(f"{plain}: a C++ symbol that libstdc++ does not have, so of torch's unstable ABI")
        elif re.match(r"(aoti_)?torch_(?!device_type).*cuda", name) and kind != "w":
            faults.append(f"{name}: must be weak, or a CPU-only torch cannot load the file")
        elif re.match(r"cu(da|blas)?[A-Z]", name):
            faults.append(f"{name}: the CUDA runtime must be linked statically")
    dynamic = output("readelf", "-d", library)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    faults += [f"{lib} must be NEEDED" for lib in ("libtorch.so", "libtorch_cpu.so") if lib not in needed]
    faults += [f"{lib} must not be NEEDED" for lib in needed if re.search("python|cuda|cudart|c10|cublas", lib)]
    faults += [f"must have no {tag}" for tag in re.findall(r"RPATH|RUNPATH", dynamic)]
    return faults


def isa_faults(library: Path) -> list[str]:
    """AVX code outside the namespaces avx2 and avx512: an inline function whose wide copy the linker kept for all, which
    would stop an older CPU (see the link order in CMakeLists.txt)."""
    function, faults = "", {}
    for line in output("objdump", "-d", "-C", "--no-show-raw-insn", library).splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
        elif re.search(r"\tv[a-z0-9]+ +.*%[xyz]mm", line) and not re.search("avx(2|512)::", function):
            faults[function] = f"{function}: AVX code in a function that every CPU may run"
    return list(faults.values())


def audit_faults(library: Path) -> list[str]:
    """What torch-abi-audit says."""
    tool = shutil.which("torch-abi-audit", path=sysconfig.get_path("scripts")) or shutil.which("torch-abi-audit")
    if tool is None:
        return ["torch-abi-audit is missing (requirements/dev.txt; it needs Python >= 3.11)"]
    report = json.loads(output(tool, "--json", library))
    torch = (report["bundled_libs"] + report["extensions"])[0]["torch"]
    print(
        f"torch-abi-audit: stable {torch['stable']}, {torch['stable_shim_count']} shims, min torch {torch['min_torch_version']}"
    )
    faults = [f"{name}: not in the stable ABI" for name in torch["unstable_symbols"]]
    if not torch["stable"] and not faults:
        faults.append("torch-abi-audit does not say STABLE")
    if tuple(map(int, torch["min_torch_version"].split(".")[:2])) > FLOOR:
        faults.append(
            f"needs torch {torch['min_torch_version']}, promised is 2.11: {torch['version_defining_symbols']}"
        )
    return faults


def main() -> int:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "python" / "lrkern" / "_C.so"
    glibc = max(re.findall(r"GLIBC_(\d+)\.(\d+)", output("objdump", "-T", library)), key=lambda v: tuple(map(int, v)))
    print(f"{library.name}: {library.stat().st_size / 1e6:.1f} MB, glibc >= {'.'.join(glibc)}")
    faults = symbol_faults(library) + isa_faults(library) + audit_faults(library)
    print(*(f"FAIL {fault}" for fault in faults), sep="\n", end="\n" if faults else "")
    print("ABI gate:", f"{len(faults)} faults" if faults else "OK")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
