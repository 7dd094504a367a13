#!/usr/bin/env bash
# Figure 1: a trained LoRA pruned by magnitude at eight densities (IconQA, rank 32).
#
#   bash scripts/fig1.sh --scale tiny|paper [--seeds N] [--jobs N] [--dry_run]
#
# 1 training, in Table 1, and 8 edits of it. For one seed, from nothing:
#   tiny   about 4 minutes on two CPU cores; any laptop.
#   paper  about 15 hours on 4 x 24 GB GPUs (computed, not measured: docs/reproduce.md).
# --dry_run lists the runs with their estimated times. Interrupted or killed? Give the same command again.
# Results: results/SCALE/runs/; `llava-sculpt report --scale SCALE --out DIR` makes tables and figures of them.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli experiment fig1 "$@"
