#!/usr/bin/env bash
# Table 3: LoRASculpt's parts SRR and RKH, each alone and together (both tasks, rank 32).
#
#   bash scripts/table3.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# 8 trainings, 4 of them in Table 1. For one seed, from nothing:
#   tiny   about 10 minutes on two CPU cores; any laptop.
#   paper  about 17 hours on 4 x 24 GB GPUs (computed, not measured: docs/reproduce.md).
# --dry_run lists the runs with their estimated times. Interrupted or killed? Give the same command again.
# Results: results/SCALE/runs/; `llava-sculpt report --scale SCALE --out DIR` makes tables and figures of them.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment table3 "$@"
