# SPDX-License-Identifier: Apache-2.0
"""Builds dist/lrkern-*-py3-none-*.whl (all CUDA architectures, no _host) and tries it in fresh environments.

python tools/smoke_wheel.py [--download] [--python PATH ...] [--require VERSION ...] [--no-build]

One wheel has to serve every Python, so 3.11, 3.12 and 3.13 are tried: those found as python3.X on PATH, under pyenv, or
named. An interpreter that imports a torch >= 2.11 lends it to its fresh environment; for the others --download fetches
the version in TORCH below (a CUDA build brings 2 to 3 GB with it and takes 5 GB of disk until the test is over). The last
line names the Pythons that did not run and why; that is a failure where --require names one, or where none ran.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The oldest we promise is one of them.
TORCH = {"3.11": "torch==2.13.0", "3.12": "torch==2.11.0", "3.13": "torch==2.13.0"}

FIND_TORCH = """
import importlib.metadata as m, importlib.util as u, os, sys
spec = u.find_spec("torch")
if spec and tuple(map(int, m.version("torch").split(".")[:2])) >= (2, 11):
    print(os.path.dirname(os.path.dirname(spec.origin)))
"""

SMOKE = """
import sysconfig, torch, lrkern
assert lrkern.__file__.startswith(sysconfig.get_path("purelib")), lrkern.__file__
print(f"torch {torch.__version__}")
"""


def interpreters(named: list[str]) -> dict[str, list[str]]:
    """Version -> interpreters, those most likely to have a torch first."""
    found: dict[str, list[str]] = {version: [] for version in TORCH}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*named, sys.executable]
    for version in TORCH:
        candidates += filter(None, [shutil.which(f"python{version}")])
        candidates += map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))
    version_of = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in candidates:
        ask = subprocess.run([python, "-c", version_of], capture_output=True, text=True)
        if not ask.returncode and (version := ask.stdout.strip()) in found:
            found[version].append(python)
    return found


def run(*command, **kwargs) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-4000:])
    return done.stdout.strip()


def build() -> Path:
    dist = ROOT / "dist"
    for old in (dist, *ROOT.glob("build/lib*")):  # modules that were deleted since would still be packed
        shutil.rmtree(old, ignore_errors=True)
    env = {k: v for k, v in os.environ.items() if k not in ("LRK_CUDA", "LRK_CUDA_ARCHS")} | {"LRK_HOST": "OFF"}
    command = sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", dist, ROOT
    log = run(*command, env=env)
    print(*{line.strip() for line in log.splitlines() if line.strip().startswith("lrkern:")}, sep="\n")
    return next(dist.glob("lrkern-*-py3-none-*.whl"))


def try_wheel(wheel: Path, version: str, pythons: list[str], download: bool) -> str:
    """The outcome as a line; raises RuntimeError when lrkern is at fault."""
    if not pythons:
        return "skipped, no such Python found"
    sites = {python: run(python, "-c", FIND_TORCH) for python in pythons}
    python = next((p for p in pythons if sites[p]), pythons[0])
    if not sites[python] and not download:
        return f"skipped, no torch in {len(pythons)} interpreters found (--download fetches {TORCH[version]})"
    with tempfile.TemporaryDirectory(prefix="lrkern_smoke_") as folder:
        run(python, "-m", "venv", folder)
        fresh = f"{folder}/bin/python"
        if sites[python]:
            site = run(fresh, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
            Path(site, "lent_torch.pth").write_text(sites[python] + "\n")
        else:
            try:
                run(fresh, "-m", "pip", "install", "-q", "--no-cache-dir", TORCH[version])
            except RuntimeError as error:
                return f"skipped, {TORCH[version]} could not be installed: {str(error).splitlines()[-1]}"
        run(fresh, "-m", "pip", "install", "-q", "--no-deps", wheel)
        said = run(fresh, "-W", "ignore", "-c", SMOKE, cwd=folder)
        info = json.loads(run(fresh, "-W", "ignore", "-m", "lrkern", "info", "--json", cwd=folder))
        run(fresh, "-W", "ignore", "-m", "lrkern", "selftest", "--quick", cwd=folder)
        archs = " ".join(info["cuda_architectures"])
        return f"OK, {said}, CUDA architectures [{archs}], CPU {info['cpu_isa']}: selftest passed"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--require", action="append", default=[], choices=TORCH, help="a Python that has to run")
    parser.add_argument("--no-build", action="store_true", help="try the wheel that dist/ holds")
    args = parser.parse_args(argv)
    start = time.monotonic()
    wheel = next((ROOT / "dist").glob("lrkern-*-py3-none-*.whl")) if args.no_build else build()
    size, took = wheel.stat().st_size / 1e6, time.monotonic() - start
    print(f"{wheel.relative_to(ROOT)}: {size:.2f} MB, {took:.0f} s", flush=True)
    outcome = {}
    for version, pythons in interpreters(args.python).items():
        start = time.monotonic()
        try:
            line = try_wheel(wheel, version, pythons, args.download)
        except RuntimeError as error:
            line = f"FAILED\n{error}"
        outcome[version] = line.split(",")[0].split("\n")[0]
        print(f"python {version}: {line} ({time.monotonic() - start:.0f} s)", flush=True)
    ran = [version for version, how in outcome.items() if how == "OK"]
    others = ", ".join(f"{version} {how}" for version, how in outcome.items() if how != "OK")
    print(f"the wheel ran in Python {', '.join(ran) or 'none'}" + (f"; NOT in {others}" if others else ""))
    return not ran or "FAILED" in outcome.values() or not set(args.require) <= set(ran)


if __name__ == "__main__":
    sys.exit(main())
