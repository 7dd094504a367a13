#!/usr/bin/env bash
# Score a model on iconqa: bash eval/iconqa.sh MODEL [flags of `llava-sculpt eval`]
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/env.sh"
exec python -m llava_sculpt.cli eval --tasks iconqa --model "$@"
