#!/usr/bin/env bash
# Table 1: seven methods at ranks 16, 32 and 64 on IconQA and COCO captions, and zero-shot.
#
#   bash scripts/table1.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# One seed, from nothing: about 40 minutes on two CPU cores (tiny); about 80 hours on 4 x 24 GB GPUs (paper; computed).
# What it trains, and what it shares with the others: docs/reproduce.md. Killed? Give the same command again.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment table1 "$@"
