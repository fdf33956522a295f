# SPDX-License-Identifier: Apache-2.0
"""The chips that times are predicted for: every figure the model takes from elsewhere, and where from.

sms, clock, DRAM, L2, FP32 lanes, tensor rate: NVIDIA's data sheets and architecture white papers of GA100, GA102, GH100 and
GB100. The clock is the one that a busy chip keeps: boost where its power allows it (H100, H200 and B200 SXM, A100), base on
the A6000, whose 300 W do not feed 84 busy SMs at boost. Load/store lanes of an SM: the white papers' drawings of one, 8 units
in each quarter, 4 on GA102. Latencies in cycles: Luo et al., arXiv 2402.13499, of A100, H100 and, for GA102, its nearest kin
there, the RTX 4090; B200 as H100. The same paper has mma.sync on H100 at five eighths of wgmma's rate. L2 bandwidth: two
thirds of what the white papers' slices and widths give (5120 bytes a cycle on GA100), about what copies inside L2 reach;
GA102 by its share of slices. wgmma's rate: 4096 dense flop of 16-bit operands a cycle and SM, what the GH100 white paper's
989.4 TFLOP/s are over 132 SMs at 1.83 GHz; its operands come from shared memory at 128 bytes a cycle, as every access there does,
and an SM gets 64 bytes a cycle from L2, by the white papers of GV100 and later. Latencies, load/store lanes and L2's widths were written from memory of these papers: read
them again before leaning on them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    arch: str  # of its machine code, as nvcc names it
    sms: int
    clock: float  # GHz
    dram: float  # bytes a nanosecond, as advertised
    l2: int  # bytes
    l2_rate: float  # bytes a nanosecond
    l1: int  # bytes of an SM's L1 and shared memory
    lanes: int  # load/store lanes of an SM
    fp32: int  # FP32 lanes of an SM
    tensor: int  # dense multiply-adds of 16-bit operands a cycle and SM, by mma.sync
    latency: dict[str, int]  # cycles from L1, shared memory, L2, DRAM
    wgmma: int = 0  # as tensor, by wgmma; 0 where there is none
    shared: int = 128  # bytes a cycle of an SM's shared memory
    port: int = 64  # bytes a cycle from L2 into an SM

    @property
    def reached(self) -> float:
        """Of DRAM's rate: what large copies reach, 90%."""
        return 0.9 * self.dram


KB, MB = 1 << 10, 1 << 20
AMPERE = {"l1": 38, "shared": 29, "l2": 262, "dram": 466}
HOPPER = {"l1": 41, "shared": 29, "l2": 263, "dram": 479}
CONSUMER = {"l1": 43, "shared": 30, "l2": 273, "dram": 542}

CHIPS = {
    "h100": Chip("90a", 132, 1.755, 3350, 50 * MB, 5500, 256 * KB, 32, 128, 1280, HOPPER, wgmma=2048),
    "h200": Chip("90a", 132, 1.755, 4800, 50 * MB, 5500, 256 * KB, 32, 128, 1280, HOPPER, wgmma=2048),
    "b200": Chip("100a", 148, 1.83, 7700, 126 * MB, 9000, 256 * KB, 32, 128, 1280, HOPPER),
    "a100": Chip("80", 108, 1.41, 2039, 40 * MB, 4800, 192 * KB, 32, 64, 1024, AMPERE),
    "a6000": Chip("86", 84, 1.41, 768, 6 * MB, 1900, 128 * KB, 16, 128, 512, CONSUMER),
}
