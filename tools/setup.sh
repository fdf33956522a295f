#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv and builds lrkern into it:  tools/setup.sh [demo] [test] [dev] [peers]   (groups of requirements/)
# Every step leaves a stamp, so a second call only does what changed. Variables (see Makefile): PYTHON, TORCH,
# TORCH_INDEX, and those of setup.py. Everything pip and the compiler say goes to .venv/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:?run this through make, which names the torch to install}
VENV=.venv
PY=$VENV/bin/python
LOG=$VENV/setup.log
STAMPS=$VENV/stamps
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PYTHONWARNINGS=ignore

die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# step "what" command...: one line per step with its time; the log's end when it fails.
step() {
  local what=$1 start=$SECONDS pid
  shift
  printf '  %-58s' "$what"
  { echo "== $what: $*" && "$@"; } >>$LOG 2>&1 </dev/null &
  pid=$!
  while [ -t 1 ] && kill -0 $pid 2>/dev/null; do
    sleep 1
    printf '\r  %-58s%4d s ' "$what" $((SECONDS - start))
  done
  if ! wait $pid; then
    printf ' failed\n'
    tail -n 40 $LOG >&2
    die "setup: '$what' failed; the whole log is $LOG"
  fi
  if [ -t 1 ]; then printf '\r  %-58s' "$what"; fi
  printf '%4d s\n' $((SECONDS - start))
}

# once <name> <what it depends on> "what" command...: a step that runs again only when its inputs change.
once() {
  local stamp=$STAMPS/$1 inputs=$2
  shift 2
  if [ "$(cat "$stamp" 2>/dev/null)" != "$inputs" ]; then
    rm -f "$stamp"
    step "$@"
    printf '%s' "$inputs" >"$stamp"
  fi
}

check_machine() {
  command -v "$PYTHON" >/dev/null || die "setup: no $PYTHON here. Debian/Ubuntu: apt-get install python3 python3-dev python3-venv"
  "$PYTHON" - <<'CHECK'
import importlib.util, os, shutil, sys, sysconfig
name, missing = "python%d.%d" % sys.version_info[:2], []
if sys.version_info < (3, 10):
    sys.exit("setup: Python >= 3.10 is needed, %s is %s. Name another: make ... PYTHON=python3.12" % (sys.executable, name))
if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
    missing.append("the venv module                 %s-venv" % name)
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    missing.append("the Python headers (Python.h)   %s-dev" % name)
if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++"):
    missing.append("a C++20 compiler                g++")
if missing:
    sys.exit("setup: missing on this machine, with the Debian/Ubuntu package that brings it (apt-get install ...):\n  "
             + "\n  ".join(missing))
CHECK
}

# The folder of a torch >= 2.11 that $PYTHON imports already, or nothing. Named TORCH wins over it.
existing_torch() {
  [ "$TORCH_GIVEN" = yes ] || "$PYTHON" - <<'FIND' 2>/dev/null || true
import importlib.metadata as m, importlib.util as u, os
spec, version = u.find_spec("torch"), m.version("torch")
if tuple(map(int, version.split(".")[:2])) >= (2, 11):
    print(os.path.dirname(os.path.dirname(spec.origin)))
FIND
}

# Only for the GPU in this machine, or not at all; LRK_CUDA or LRK_CUDA_ARCHS in the environment decide otherwise.
choose_cuda() {
  note=""
  if [ -n "${LRK_CUDA:-}${LRK_CUDA_ARCHS:-}" ]; then return; fi
  export LRK_CUDA=OFF
  local caps
  caps=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d '. ' | sort -u | grep -E '^[0-9]+$' || true)
  if [ -z "$caps" ]; then
    note=": nvidia-smi shows no GPU; LRK_CUDA=AUTO compiles for all"
  elif command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/nonexistent}/bin/nvcc" ]; then
    export LRK_CUDA=ON LRK_CUDA_ARCHS
    LRK_CUDA_ARCHS=$(printf '%s-real;' $caps)
    LRK_CUDA_ARCHS=${LRK_CUDA_ARCHS%;}
  else
    note=": a GPU is here, but no nvcc on PATH or in CUDA_HOME"
  fi
}

make_venv() {
  local torch_site=$1
  "$PYTHON" -m venv --clear $VENV
  mkdir -p $STAMPS
  if [ -n "$torch_site" ]; then
    # --system-site-packages would miss a torch that itself lives in a venv; a path file sees every kind.
    echo "$torch_site" >"$($PY -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/existing_torch.pth"
  fi
}

pin_torch() { # with the local part (+cpu, +cu130), so that nothing later swaps it for gigabytes of another build
  $PY -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >$VENV/constraints.txt
}

peers_vllm() { # its LoRA ops alone, which need torch and nothing else of it
  local whole=$VENV/peers/wheel
  rm -rf $whole
  $PY -m pip download --no-deps -d $whole -r requirements/peers_vllm.txt
  $PY -c 'import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.startswith("vllm/lora/ops/")])' \
    $whole/*.whl $VENV/peers
  rm -r $whole
}

build_in_place() {
  $PY setup.py -q build_ext --inplace
  grep -o 'lrkern: .*' $LOG | tail -n 1 >$VENV/build_line
}

check_machine
# Where .venv itself is activated, python3 is its own: go by the Python below it.
PYTHON=$("$PYTHON" -c 'import os, sys
print(sys._base_executable if os.path.realpath(sys.prefix) == os.path.realpath(".venv") else sys.executable)')
TORCH_GIVEN=${TORCH_GIVEN:-no}
site=$(existing_torch)
key="$("$PYTHON" -c 'import sys; print(sys.base_prefix, sys.version)') ${site:-$TORCH ${TORCH_INDEX:-}}"
if [ "$(cat $STAMPS/venv 2>/dev/null)" != "$key" ]; then
  if [ -d $VENV ]; then echo "  .venv is for another Python or torch: made anew"; fi
  LOG=$(mktemp) step "a virtual environment in $VENV" make_venv "$site"
  printf '%s' "$key" >$STAMPS/venv
fi

if [ -n "$site" ]; then
  once torch "$key" "the torch that $PYTHON has is used" pin_torch
else
  once torch "$key" "$TORCH${TORCH_INDEX:+ from TORCH_INDEX}" \
    $PY -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
  pin_torch
fi
pip_install=($PY -m pip install -c $VENV/constraints.txt)
pinned=$(cat $VENV/constraints.txt)

for group in build "$@"; do
  if [ $group = peers ]; then
    once peers "$pinned $(cat requirements/peers.txt)" "requirements/peers.txt" \
      "${pip_install[@]}" --no-deps --upgrade --target $VENV/peers -r requirements/peers.txt
    continue
  fi
  if [ $group = peers_vllm ]; then
    once peers_vllm "$(cat requirements/peers_vllm.txt)" "requirements/peers_vllm.txt, of which vllm/lora/ops is kept" \
      peers_vllm
    continue
  fi
  once $group "$pinned $(cat requirements/$group.txt)" "requirements/$group.txt" "${pip_install[@]}" -r requirements/$group.txt
  if [ -f requirements/$group-nodeps.txt ]; then
    once $group-nodeps "$(cat requirements/$group-nodeps.txt)" "requirements/$group-nodeps.txt" \
      "${pip_install[@]}" --no-deps -r requirements/$group-nodeps.txt
  fi
done

choose_cuda
once editable "$pinned $(cat pyproject.toml setup.py)" "lrkern, compiled and linked into .venv" \
  "${pip_install[@]}" -v --no-build-isolation --no-deps -e .
step "compiled parts up to date" build_in_place
echo "  $(cat $VENV/build_line)$note"
