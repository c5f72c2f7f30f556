"""Our own kernels for the memories on processors where the library's small products are slow: built, registered.

MKL takes its AVX2 path on AMD processors, also on those with full-width AVX-512: there the kernel in cpu_products.cpp
computes batches of 64 x 64 products more than twice as fast (docs/benchmarks). Only compiled chunk functions use it, in
float32: a pass over the compiler's graph puts it in the place of `aten::bmm`. `cpu_piece` is whole chunks as one
kernel. Whether they are used depends on the processor and the configuration, not on a timing, so that a run resumes to
the same bits on the same machine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_products.cpp", "cpu_piece.cpp"))
HEADERS = tuple(sorted(Path(__file__).parent.glob("cpu_*.h")))
READY = False
"""Whether the kernels have been loaded: what the traced functions ask."""

LANES = 16
"""Floats in a vector: the number of columns must be a multiple."""


def wanted() -> bool:
    """Whether this processor gains from the kernel: AVX-512, and not Intel's, where the library uses it too."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


@functools.lru_cache(maxsize=1)
def load() -> bool:
    """Build (once per machine and version, a few seconds) and register `torch.ops.hope.bmm`. False: not available here,
    and the compiler's own products are used; where they would be slower, a line on standard error says so."""
    if not wanted():
        return False
    from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-shared", "-fPIC", "-fopenmp"]
    # -march=native: a home directory may be shared by machines with other processors.
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\n".join([*texts, torch.__version__, _processor(), *flags]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hope_train"
    library = folder / f"cpu_products_{key}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{library.name}.lock"):
            if not library.exists():
                unfinished = library.with_suffix(".tmp")
                includes = [word for path in include_paths() for word in ("-isystem", path)]
                abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
                links = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
                command = [get_cxx_compiler(), *flags, abi, *includes, "-x", "c++", "-", "-o", str(unfinished), *links]
                # as one unit: torch's headers take most of the time
                unit = "".join(f'#include "{path}"\n' for path in SOURCES)
                subprocess.run(command, check=True, capture_output=True, input=unit.encode())
                unfinished.replace(library)
        torch.ops.load_library(str(library))
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on a machine
            print(f"warning: {_reason(error)}: the memories use the library's slower products", file=sys.stderr)
        return False
    global READY
    if not READY:  # a process registers once
        torch.library.register_fake("hope::bmm", _shape)
        torch.library.register_fake("hope::unit_lower_inverse", torch.empty_like)
        _lower()
    READY = True
    return True


def _reason(error: Exception) -> str:
    """In a line: what kept the kernel from being built or loaded."""
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
        first = next((line for line in said if "error" in line), said[0])
        return f"{error.cmd[0]} cannot build {SOURCES[0].name} ({first.strip()[:200]})"
    return f"{SOURCES[0].name} cannot be built or loaded ({' '.join(str(error).split())[:200]})"


def inverts(lower: Tensor) -> bool:
    """Whether `hope::unit_lower_inverse` takes such matrices."""
    return lower.device.type == "cpu" and lower.dtype == torch.float32 and lower.shape[-1] in (16, 32, 64)


def _lower() -> None:
    """Let the compiler plan the memory of the results, as it does for its own products."""
    from torch._inductor.ir import ExternKernel, FixedLayout
    from torch._inductor.lowering import register_lowering
    from torch._inductor.select_algorithm import ExternKernelChoice

    choice = ExternKernelChoice(torch.ops.hope.bmm.out, name="hope_bmm")

    @register_lowering(torch.ops.hope.bmm.default, type_promotion_kind=None)
    def lower(a: Any, b: Any) -> Any:
        a, b = ExternKernel.realize_input(a), ExternKernel.realize_input(b)
        layout = FixedLayout(a.get_device(), a.get_dtype(), [a.get_size()[0], a.get_size()[1], b.get_size()[2]])
        return choice.bind((a, b), layout).output_node()


def _shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[:40] if line.startswith(("flags", "model name")))
