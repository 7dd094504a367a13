#!/usr/bin/env bash
# Figure 3: one to five epochs of LoRA, Model Tailor and LoRASculpt (IconQA, rank 32).
#
#   bash scripts/fig3.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# One seed, from nothing: about 15 minutes on two CPU cores (tiny); about 29 hours on 4 x 24 GB GPUs (paper; computed).
# What it trains, and what it shares with the others: docs/reproduce.md. Killed? Give the same command again.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment fig3 "$@"
