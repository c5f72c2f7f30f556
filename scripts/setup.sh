#!/usr/bin/env bash
# Makes the environment .venv: torch first, then everything else at the versions of constraints.txt.
# Fast when nothing has changed. Variables: PYTHON (interpreter, 3.11 or newer), TORCH_INDEX (package index of torch).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

inputs=$(cat pyproject.toml constraints.txt scripts/setup.sh scripts/install_torch.py | cksum)
up_to_date() {
    [ -x .venv/bin/hope ] && [ -f .venv/.stamp ] || return 1
    [ "$(sed -n 1p .venv/.stamp)" = "$inputs" ] || return 1
    # No TORCH_INDEX means no opinion: the torch that is there stays.
    [ -z "${TORCH_INDEX:-}" ] || [ "$(sed -n 2p .venv/.stamp)" = "$TORCH_INDEX" ]
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# An environment whose making was interrupted has no pip yet.
works() {
    is_new_enough .venv/bin/python && [ -x .venv/bin/pip ]
}

find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program"
        is_new_enough "$PYTHON" || fail "Python 3.11 or newer is needed; PYTHON=$PYTHON is $("$PYTHON" --version 2>&1)"
        printf '%s\n' "$PYTHON"
        return
    fi
    if works; then
        printf '%s\n' .venv/bin/python # nothing to choose any more
        return
    fi
    for name in python3 python python3.11 python3.12 python3.13; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; python3 here is '$(python3 --version 2>&1 || true)'. Install one and say: make setup PYTHON=/path/to/python3.11"
}

# pip says hundreds of lines; these show that it is alive. All of them are in .venv/setup.log.
show_progress() {
    local line found=0
    while IFS= read -r line; do
        case $line in
            Collecting*)
                found=$((found + 1))
                if [ $((found % 25)) -eq 0 ]; then printf '      %d packages found\n' "$found"; fi
                ;;
            "Installing collected packages"*) printf '      installing %d packages\n' "$(tr -cd , <<<"$line" | wc -c | xargs expr 1 +)" ;;
        esac
    done
}

up_to_date && exit 0
# Also where .venv is there: a wrong PYTHON is said, not passed over.
python=$(find_python)

if [ -e .venv ] && ! works; then
    printf 'setup: .venv has no working Python 3.11 or newer; making it anew\n'
    rm -rf .venv
fi
mkdir -p .venv
if command -v flock >/dev/null; then
    # A second make in the same tree waits for the first and then finds everything done.
    exec 9>.venv/.lock
    flock 9
    up_to_date && exit 0
fi
begun=$SECONDS
rm -f .venv/.stamp

if [ ! -x .venv/bin/python ]; then
    printf 'setup 1/3: .venv with %s\n' "$("$python" --version)"
    "$python" -m venv .venv >.venv/setup.log 2>&1 ||
        fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv); see .venv/setup.log"
else
    printf 'setup 1/3: .venv is there (%s)\n' "$(.venv/bin/python --version)"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

printf 'setup 2/3: torch\n'
.venv/bin/python scripts/install_torch.py

printf 'setup 3/3: the other packages (one to three minutes)\n'
.venv/bin/python -m pip install --progress-bar off --constraint constraints.txt --editable '.[dev]' 2>&1 |
    tee .venv/setup.log | show_progress || {
    grep -v '^WARNING' .venv/setup.log | tail -n 15 >&2
    fail "pip could not install the packages; its whole words are in .venv/setup.log"
}

.venv/bin/python -c 'import torch, hope_train' || fail "torch does not import in .venv"
printf '%s\n%s\n' "$inputs" "${TORCH_INDEX:-}" >.venv/.stamp
printf 'setup: done in %d s; the command is .venv/bin/hope\n' "$((SECONDS - begun))"
