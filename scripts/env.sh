# Sourced by every script: go to the repository, pick the environment.
# The active one if llava_sculpt and torch import there (in the repository the package alone always does), else .venv, else .venv is made first (`make setup`).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! python -c "import llava_sculpt, torch" >/dev/null 2>&1; then
    if ! .venv/bin/python -c "import llava_sculpt, torch" >/dev/null 2>&1; then
        echo "No environment with llava_sculpt yet: making .venv (make setup)"
        make setup
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
fi
