#!/usr/bin/env bash
# Writes constraints.txt anew: the newest versions that pyproject.toml allows, installed into an empty environment.
# torch keeps its pinned version unless TORCH=<version> names another. Run `make test-all` before committing the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
# The build without CUDA where there is no GPU: the packages of the other would all be pinned.
"$scratch/venv/bin/python" scripts/install_torch.py "$torch"
"$scratch/venv/bin/python" -m pip install -qq --progress-bar off "torch==$torch" --editable '.[dev]'
{
    echo "# The exact versions that the tests ran with; written by scripts/lock.sh. Ranges are in pyproject.toml."
    # Local parts (+cpu) name a build, not a version; the rest of freeze's lines must be plain pins.
    "$scratch/venv/bin/python" -m pip freeze --exclude-editable | sed -e 's/+[A-Za-z0-9.]*$//' -e '/ @ /d'
} >"$scratch/constraints.txt"
mv "$scratch/constraints.txt" constraints.txt
