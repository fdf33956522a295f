# SPDX-License-Identifier: Apache-2.0
"""Checks that need two processes on gloo: a file of workers registers functions of the rank, a test runs them."""

import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


def run(workers: str, folder: Path) -> dict[str, str | None]:
    """Of a file beside this one: check -> None or the traceback of the process it failed in."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    outs = [(folder / f"{rank}.out").open("w+") for rank in (0, 1)]
    children = [
        subprocess.Popen([sys.executable, HERE / workers, str(rank), folder], stdout=out, stderr=out, env=env)
        for rank, out in enumerate(outs)
    ]
    try:
        for child in children:
            child.wait(timeout=300)
    finally:
        for child in children:
            child.kill()
    results = {}
    for rank, (child, out) in enumerate(zip(children, outs, strict=True)):
        out.seek(0)
        assert child.returncode == 0, f"rank {rank}:\n{out.read()}"
        for name, error in json.loads((folder / f"{rank}.json").read_text()).items():
            results[name] = results.get(name) or (error and f"rank {rank}:\n{error}")
    return results


def main(checks: dict) -> None:
    """Of a worker: WORKERS RANK FOLDER. Each check has a process group of its own; writes FOLDER/RANK.json."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {}
    for name, function in checks.items():
        store, limit = folder / f"{name}.store", datetime.timedelta(seconds=30)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
        try:
            function(rank)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(results))
