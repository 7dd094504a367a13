#!/usr/bin/env bash
# Fine-tune LLaVA-1.5 on COCO captions, then evaluate the Target and the four Source tasks.
#
#   bash scripts/finetune_coco.sh [--scale paper|tiny] [--method sculpt|lora|dora|l2|orth] [--rank 16|32|64]
#                               [--seed N] [--output_dir DIR] [any flag of the training entry point]
#
# Default: LoRASculpt at rank 32, at the scale this machine can run.
#   paper  4 x 24 GB GPUs, LLaVA-1.5-7B, 10,000 samples x 3 epochs (DeepSpeed ZeRO-2, global batch 16).
#   tiny   the embedded tiny LLaVA on generated images: a few minutes on two CPU cores.
# Ends with a table (zero-shot, this run, earlier runs) and a figure. Interrupted? Give the same command again.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli finetune coco "$@"
