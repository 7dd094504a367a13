#!/usr/bin/env bash
# Zero-shot, LoRA and LoRASculpt at rank 32 on tiny IconQA, side by side: what is learned, what is forgotten.
# Any flag goes to both runs. Needs a CPU; the README says how long it takes.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
bash "$here/finetune_iconqa.sh" --scale tiny --method lora "$@"
bash "$here/finetune_iconqa.sh" --scale tiny --method sculpt "$@"
