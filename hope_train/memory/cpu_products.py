"""Our own kernel for the small batched products of the memories, on CPUs where the library's is slow.

MKL takes its AVX2 path on AMD processors, also on those with full-width AVX-512: there the kernel in cpu_products.cpp
computes batches of 64 x 64 products more than twice as fast (docs/benchmarks). Only compiled chunk functions use it,
in float32: a pass over the compiler's graph puts it in the place of `aten::bmm`. Whether it is used depends on the
processor alone, not on a timing, so that a run resumes to the same bits on the same machine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

SOURCE = Path(__file__).with_name("cpu_products.cpp")
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
    and the compiler's own products are used."""
    if not wanted():
        return False
    from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-shared", "-fPIC", "-fopenmp"]
    # -march=native: a home directory may be shared by machines with other processors.
    key = hashlib.sha256(
        "\n".join([SOURCE.read_text(encoding="utf-8"), torch.__version__, _processor(), *flags]).encode()
    ).hexdigest()[:16]
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
                command = [get_cxx_compiler(), *flags, abi, *includes, str(SOURCE), "-o", str(unfinished), *links]
                subprocess.run(command, check=True, capture_output=True)
                unfinished.replace(library)
        torch.ops.load_library(str(library))
    except (OSError, subprocess.CalledProcessError, RuntimeError):
        return False
    torch.library.register_fake("hope::bmm", _shape)
    _lower()
    return True


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


class UseOurProducts(CustomGraphPass):
    """The compiler's graph with its batched float32 products on the CPU replaced by ours."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Change the graph in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
            result = node.meta.get("val")
            if not isinstance(result, Tensor) or result.device.type != "cpu" or result.dtype != torch.float32:
                continue
            if isinstance(result.shape[-1], int) and result.shape[-1] % LANES == 0:
                node.target = torch.ops.hope.bmm.default

    def uuid(self) -> Any:
        """What the compiler's cache knows this pass by."""
        return get_hash_for_files((__file__, str(SOURCE)))
