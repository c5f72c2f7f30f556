"""Install the torch that constraints.txt names into this environment, without CUDA where it is of no use.

Run by scripts/setup.sh with the environment's own Python; needs the standard library and pip (23.2 or newer) only.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = [sys.executable, "-m", "pip"]


def pinned_version(constraints: str) -> str:
    """The version in the line `torch==…`. Raises SystemExit when there is none."""
    match = re.search(r"^torch==([^\s;+]+)", constraints, re.MULTILINE)
    if match is None:
        raise SystemExit("error: constraints.txt has no line torch==<version>")
    return match[1]


def has_nvidia_gpu() -> bool:
    """Whether a driver sees a GPU; nvidia-smi alone is also on machines without one."""
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def offered_versions(extra: Sequence[str] = ()) -> list[str]:
    """The versions of torch that pip finds in its configured places, or with `extra` options; [] when it finds none.

    This reads index pages alone. `pip install --dry-run` would tell the same, but pip 23 downloads
    gigabytes of CUDA wheels to answer.
    """
    answer = subprocess.run([*PIP, "index", "versions", "torch", *extra], capture_output=True, text=True, check=False)
    match = re.search(r"^Available versions: (.*)$", answer.stdout, re.MULTILINE)
    return [version.strip() for version in match[1].split(",")] if match else []


def choose(version: str, platform: str, gpu: bool, index: str | None) -> tuple[list[str], str]:
    """pip's arguments for the torch to install, and a line that says why.

    Asks pip only where the answer matters: on Linux without a GPU, where the package of the main
    index brings several GB of CUDA libraries.
    """
    if index:
        return [f"torch=={version}", "--index-url", index], f"torch {version} from {index} (TORCH_INDEX)"
    if gpu or platform != "linux":
        return [f"torch=={version}"], f"torch {version}" + (" for the NVIDIA GPU found here" if gpu else "")
    wanted = f"{version}+cpu"
    if wanted in offered_versions():
        return [f"torch=={wanted}"], f"torch {wanted}, no GPU here"
    options = ["--index-url", CPU_INDEX]
    if wanted in offered_versions([*options, "--timeout", "5", "--retries", "0"]):
        return [f"torch=={wanted}", *options], f"torch {wanted} from {CPU_INDEX}, no GPU here"
    return [f"torch=={version}"], (
        f"torch {version} from the default index: no CPU build found there or at {CPU_INDEX}, so this may fetch "
        "several GB of CUDA packages (make setup TORCH_INDEX=<url> names another index)"
    )


def installed_version() -> str | None:
    """The version of torch in this environment, with its local part."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] = ()) -> int:
    """Install if need be; pip's exit code. `arguments`: a version in place of the pinned one, with whatever packages
    it wants (for scripts/lock.sh)."""
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    version = arguments[0] if arguments else pinned_version(constraints.read_text(encoding="utf-8"))
    index = os.environ.get("TORCH_INDEX") or None
    present = installed_version()
    if present is not None and present.partition("+")[0] == version and index is None:
        print(f"      torch {present} is installed", flush=True)
        return 0
    chosen, why = choose(version, sys.platform, has_nvidia_gpu(), index)
    print(f"      {why}", flush=True)
    if present is not None and index is not None:
        # The same version from another index counts as installed for pip.
        chosen.append("--force-reinstall")
    held = [] if arguments else ["--constraint", str(constraints)]
    command = [*PIP, "install", "-qq", "--progress-bar", "off", *held, *chosen]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
