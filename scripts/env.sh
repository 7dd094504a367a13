#!/usr/bin/env bash
# Sourced by every script: go to the repository, pick the environment.
# The active one if the package's libraries are in it, else .venv; that is made first if need be (`make setup`).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
present='import sys; from importlib.util import find_spec as find; sys.exit(not (find("torch") and find("peft")))'
if ! python -c "$present" >/dev/null 2>&1; then
    if ! [ -e .venv/bin/.ready ]; then
        echo "No environment with llava_sculpt yet: making .venv (make setup)"
        make setup
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
fi
