#!/usr/bin/env bash
# Table 1: seven methods at ranks 16, 32 and 64 on IconQA and COCO captions, and zero-shot.
#
#   bash scripts/table1.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# 30 trainings and 12 edits of trained adapters. For one seed, from nothing:
#   tiny   about 40 minutes on two CPU cores; any laptop.
#   paper  about 80 hours on 4 x 24 GB GPUs (computed, not measured: docs/reproduce.md).
# --dry_run lists the runs with their estimated times. Interrupted or killed? Give the same command again.
# Results: results/SCALE/runs/; `llava-sculpt report --scale SCALE --out DIR` makes tables and figures of them.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment table1 "$@"
