#!/usr/bin/env bash
# Figure 5: density of BA in every layer beside Theorem 3.1 (both tasks, rank 32).
#
#   bash scripts/fig5.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# 2 trainings, both in Table 1. For one seed, from nothing:
#   tiny   about 3 minutes on two CPU cores; any laptop.
#   paper  about 4 hours on 4 x 24 GB GPUs (computed, not measured: docs/reproduce.md).
# --dry_run lists the runs with their estimated times. Interrupted or killed? Give the same command again.
# Results: results/SCALE/runs/; `llava-sculpt report --scale SCALE --out DIR` makes tables and figures of them.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment fig5 "$@"
