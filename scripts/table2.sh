#!/usr/bin/env bash
# Table 2: connector fully fine-tuned, with LoRA, frozen, or with LoRA and its regularizer (IconQA, rank 64).
#
#   bash scripts/table2.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# One seed, from nothing: about 7 minutes on two CPU cores (tiny); about 11 hours on 4 x 24 GB GPUs (paper; computed).
# What it trains, and what it shares with the others: docs/reproduce.md. Killed? Give the same command again.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment table2 "$@"
