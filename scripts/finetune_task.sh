#!/usr/bin/env bash
# Fine-tune LLaVA-1.5 on your own task, then evaluate it and the Source tasks that are prepared.
#
#   bash scripts/finetune_task.sh --data train.json [--images DIR] [--test test.json | --holdout 0.1] [--name NAME]
#                             [--metric exact|contains|vqa|choice|cider] [any flag of scripts/finetune_iconqa.sh]
#
# train.json and test.json are LLaVA conversations; the last answer of a test record is the gold answer. Without --test
# a tenth of the pictures is held out. The settings are those of IconQA. Once prepared the task has a name:
# `bash scripts/finetune_task.sh NAME --method lora`. All of it: docs/data.md. Scales and end as in finetune_iconqa.sh.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m llava_sculpt.cli finetune "$@"
