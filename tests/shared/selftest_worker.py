# SPDX-License-Identifier: Apache-2.0
"""A device's process of lrkern's selftest, with faults planted in ops:  selftest_worker.py '{"op": "fault"}' DEVICE MODE OP...

cuda:0 is the emulated kernels, any other device the CPU by another name, which fused paths have in name alone.
"""

import faulthandler
import json
import os
import sys
import time
from pathlib import Path

import torch

from lrkern import selftest
from lrkern.ops.dispatch import library, use_library
from lrkern.testing import FUSED

SHARED = Path(__file__).parent
sys.path += [str(SHARED), str(SHARED.parents[1]), str(SHARED.parent / "emulator")]


def off(y):
    return y * 1.005


def fused(y):
    return off(y) if os.environ[FUSED] == "all" else y


def varies(y, calls=[0]):  # noqa: B006, it counts
    calls[0] += 1
    return y.nextafter(y.new_tensor(9.0)) if calls[0] % 5 < 2 else y


def unwritten(y):
    out = torch.empty_like(y)
    out.view(-1)[:-1] = y.reshape(-1)[:-1]
    return out


def raises(y):
    raise RuntimeError("an illegal memory access was encountered")


def ends(y):
    os.abort()


arm, armed = faulthandler.dump_traceback_later, []


def leaves(y):
    os._exit(0)


def hangs(y):
    """On a busy machine any op may take seconds: only this one's time is short, where there was a limit to it."""
    assert armed
    arm(0.2, exit=True)
    time.sleep(600)


def loses(y):
    selftest.answers = lambda device: False
    raises(y)


class Faulty:
    """A library whose ops give the right result, and what a fault makes of it."""

    def __init__(self, of, faults):
        self.of, self.faults = of, faults

    def __getattr__(self, name):
        packet, fault = getattr(self.of, name), self.faults.get(name.removesuffix("_fwd"))
        return Packet(packet.default, globals()[fault]) if fault else packet


class Packet:
    def __init__(self, op, fault):
        self.op, self.fault = op, fault

    def default(self, *args):
        y = self.op(*args)
        return (self.fault(y[0]), *y[1:]) if isinstance(y, tuple) else self.fault(y)


if __name__ == "__main__":
    faults, place, *rest = sys.argv[1:]
    device = place.removesuffix(selftest.FUSED)
    of, selftest.QUICK, selftest.SIZES["cpu"] = library(), 1, (2, 32, 32, 4)
    faulthandler.dump_traceback_later = lambda limit, exit: armed.append(limit)
    if device == "cuda:0":
        from tests.conftest import emulated_ops

        of = emulated_ops()
    with use_library(Faulty(of, json.loads(faults))):
        selftest.work(place.replace(device, "cpu"), *rest)
