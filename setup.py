# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled parts with CMake and ninja. Metadata is in pyproject.toml, sources and flags in CMakeLists.txt.

Environment: LRK_CUDA=AUTO|ON|OFF, LRK_CUDA_ARCHS="80-real;90-real", LRK_HOST=ON|OFF, LRK_TORCH_DIR, MAX_JOBS, CMAKE_ARGS.
"""

import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HOST = os.environ.get("LRK_HOST", "ON").upper() not in ("OFF", "0")


def torch_dir() -> Path:
    """The installed torch, found without importing it. Inside pip's isolation, purelib still names the target venv."""
    if named := os.environ.get("LRK_TORCH_DIR"):
        found = Path(named)
    else:
        site = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        spec = importlib.util.find_spec("torch") or importlib.machinery.PathFinder.find_spec("torch", site)
        if spec is None or spec.origin is None:
            raise SystemExit(
                f"lrkern: no torch found for {sys.executable}. Install torch >= 2.11 first, or let LRK_TORCH_DIR name "
                "the folder of one, or build with `pip install --no-build-isolation .` where python can import it."
            )
        found = Path(spec.origin).parent
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (found / "version.py").read_text())
    if version is None or tuple(map(int, version.groups())) < (2, 11):
        raise SystemExit(f"lrkern: needs torch >= 2.11, {found} is {version and '.'.join(version.groups())}")
    return found


class CMakeBuild(build_ext):
    def run(self):
        cuda, archs = os.environ.get("LRK_CUDA", "AUTO").upper(), os.environ.get("LRK_CUDA_ARCHS", "")
        # Not pip's temporary folder, which would lose every object file; one per setting, so that none undoes another.
        setting = "cpu" if cuda == "OFF" else re.sub("[;, ]+", "_", archs) or "default"
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{setting}"
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT / "python" if inplace else Path(self.build_lib).resolve()) / "lrkern"
        # cmake and ninja of this Python come first, so that no venv has to be activated.
        env = dict(os.environ, PATH=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
        if env.get("CUDA_HOME") and "CUDACXX" not in env and not shutil.which("nvcc", path=env["PATH"]):
            env["CUDACXX"] = f"{env['CUDA_HOME']}/bin/nvcc"
        options = {
            "TORCH_DIR": torch_dir(),
            "LRK_HOST": "ON" if HOST else "OFF",
            "LRK_CUDA": cuda,
            "LRK_CUDA_ARCHS": archs,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja", path=env["PATH"]),
            "Python_EXECUTABLE": sys.executable,
        }
        if HOST:
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
        jobs = env.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        settings = [*(f"-D{k}={v}" for k, v in options.items()), *shlex.split(env.get("CMAKE_ARGS", ""))]

        def cmake(*args, **kwargs):
            done = subprocess.run(["cmake", *map(str, args)], env=env, text=True, **kwargs)
            if done.returncode:
                raise SystemExit(f"{done.stdout or ''}\nlrkern: the build failed, see above")
            return done.stdout

        out = cmake("-G", "Ninja", "-S", ROOT, "-B", build, *settings, stdout=subprocess.PIPE)
        print(*re.findall("lrkern: .*", out), sep="\n", flush=True)
        cmake("--build", build, "-j", jobs)
        for old in () if inplace else package.glob("*.so"):
            old.unlink()  # setuptools keeps its folder between builds; a wheel without _host must not find an old one
        cmake("--install", build, "--prefix", package, stdout=subprocess.PIPE)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if HOST else ("py3", "none", platform)  # _C.so has no symbol of libpython


setup(ext_modules=[Extension("lrkern._C", [])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
