#!/usr/bin/env bash
# Figure 5: density of BA in every layer beside Theorem 3.1 (both tasks, rank 32).
#
#   bash scripts/fig5.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# One seed, from nothing: about 3 minutes on two CPU cores (tiny); about 4 hours on 4 x 24 GB GPUs (paper; computed).
# What it trains, and what it shares with the others: docs/reproduce.md. Killed? Give the same command again.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment fig5 "$@"
