#!/usr/bin/env bash
# Table 2: connector fully fine-tuned, with LoRA, frozen, or with LoRA and its regularizer (IconQA, rank 64).
#
#   bash scripts/table2.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# 5 trainings, 2 of them in Table 1. For one seed, from nothing:
#   tiny   about 7 minutes on two CPU cores; any laptop.
#   paper  about 11 hours on 4 x 24 GB GPUs (computed, not measured: docs/reproduce.md).
# --dry_run lists the runs with their estimated times. Interrupted or killed? Give the same command again.
# Results: results/SCALE/runs/; `llava-sculpt report --scale SCALE --out DIR` makes tables and figures of them.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment table2 "$@"
