"""What a device can do, from its vendor's data sheet. No torch: a plan is made on machines without the device."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from hope_train.errors import UserError
from hope_train.machine import memory_bytes

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator (or CPU) as a planner sees it.

    Peaks are dense (no structured sparsity) FLOP/s with a multiply-add as 2; memory is in bytes; bandwidth in bytes/s.
    Vendors name memory in GB and ship within 1-2% of that many GiB, which is what drivers report and what stands here.
    """

    name: str
    title: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int
    bandwidth: float

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of the matrix products of a run with `train.precision` (fp32: no TF32, torch's default)."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    @property
    def memory_gib(self) -> float:
        """Memory in GiB."""
        return self.memory_bytes / GIB


def _device(name: str, title: str, bf16_tflops: float, fp32_tflops: float, gib: float, tb_per_s: float) -> Device:
    return Device(name, title, bf16_tflops * 1e12, fp32_tflops * 1e12, int(gib * GIB), tb_per_s * 1e12)


_DEVICES = (
    # NVIDIA HGX B200 data sheet, per GPU: 4.5 PFLOP/s sparse bf16, 180 GB HBM3e, 7.7 TB/s.
    _device("b200", "NVIDIA B200 SXM", 2250, 75, 179, 7.7),
    # NVIDIA H200 data sheet (SXM): 1979 TFLOP/s sparse bf16, 67 fp32, 141 GB HBM3e, 4.8 TB/s.
    _device("h200", "NVIDIA H200 SXM", 989.5, 67, 141, 4.8),
    # NVIDIA GH200 data sheet (96 GB HBM3): the H100's compute, 4.0 TB/s.
    _device("gh200", "NVIDIA GH200 (96 GB)", 989.5, 67, 95, 4.0),
    # NVIDIA H100 data sheet: SXM 1979 TFLOP/s sparse bf16, 80 GB, 3.35 TB/s; PCIe 1513 sparse, 51 fp32, 2.0 TB/s.
    _device("h100", "NVIDIA H100 SXM", 989.5, 67, 80, 3.35),
    _device("h100-pcie", "NVIDIA H100 PCIe", 756.5, 51, 80, 2.0),
    # NVIDIA A100 data sheet: 312 TFLOP/s dense bf16, 19.5 fp32; 80 GB SXM 2.039 TB/s, 40 GB 1.555 TB/s.
    _device("a100-80", "NVIDIA A100 80 GB SXM", 312, 19.5, 80, 2.039),
    _device("a100-40", "NVIDIA A100 40 GB", 312, 19.5, 40, 1.555),
    # NVIDIA L40S data sheet: 362 TFLOP/s dense bf16, 91.6 fp32, 48 GB GDDR6 (45 GiB left with ECC on), 0.864 TB/s.
    _device("l40s", "NVIDIA L40S", 362, 91.6, 45, 0.864),
    # NVIDIA L4 data sheet: 242 TFLOP/s sparse bf16, 30.3 fp32, 24 GB (22.5 GiB left with ECC on), 0.3 TB/s.
    _device("l4", "NVIDIA L4", 121, 30.3, 22.5, 0.3),
    # NVIDIA Ada whitepaper, RTX 4090: 165.2 TFLOP/s dense bf16 with fp32 accumulation, 82.6 fp32, 24 GB, 1.008 TB/s.
    _device("rtx4090", "NVIDIA GeForce RTX 4090", 165.2, 82.6, 24, 1.008),
    # NVIDIA GA102 whitepaper, RTX 3090: 71 TFLOP/s dense bf16 with fp32 accumulation, 35.6 fp32, 24 GB, 0.936 TB/s.
    _device("rtx3090", "NVIDIA GeForce RTX 3090", 71, 35.6, 24, 0.936),
    # AMD Instinct MI300X data sheet: 1307 TFLOP/s dense bf16, 163.4 fp32 (matrix and vector), 192 GB, 5.3 TB/s.
    _device("mi300x", "AMD Instinct MI300X", 1307, 163.4, 192, 5.3),
    # Not a data sheet: one core of an AVX2 server at 2.5 GHz, two 8-wide fused multiply-adds per cycle = 80 GFLOP/s;
    # bf16 is emulated there, so it is given the same peak. Bandwidth is one core's share of a small server; memory, in
    # a plan, this machine's.
    _device("cpu", "one CPU core (AVX2, 2.5 GHz)", 0.08, 0.08, 8, 0.01),
)
DEVICES: dict[str, Device] = {device.name: device for device in _DEVICES}

_ALIASES = {"a100": "a100-80", "h100-sxm": "h100", "h200-sxm": "h200", "4090": "rtx4090", "3090": "rtx3090"}


def find_device(name: str, count: int = 1) -> Device:
    """The device called `name` (case and a leading `nvidia-` do not matter; `a100` is the 80 GB one).

    `cpu` is a core of this machine, with its memory; `count` of them share it.

    Raises UserError with the nearest names for one that is not listed.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    key = _ALIASES.get(key, key)
    if key == "cpu":
        return replace(DEVICES[key], memory_bytes=memory_bytes() // max(count, 1))
    if key in DEVICES:
        return DEVICES[key]
    raise UserError(f"unknown device {name!r}: {nearest(key, DEVICES)}known are {', '.join(DEVICES)}")


def nearest(word: str, names: Iterable[str]) -> str:
    """`did you mean a or b? ` with the names like `word`; nothing where there are none."""
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""
