#!/usr/bin/env bash
# Train a drafter for your own target and conversations, with the settings of an experiment.
#
#   examples/train_your_own.sh TARGET CONVERSATIONS PROMPTS +experiment=NAME [override ...]
#
# TARGET: a directory or Hub id. CONVERSATIONS: a file (.jsonl, .json, .parquet, .arrow), a folder, or a Hub data set.
# PROMPTS: held-out questions, records with `turns` or `messages`. Experiments: tiny for a CPU, qwen3_8b for one GPU.
# After an interruption, the same command resumes. The drafter is in checkpoints/mine/export.
set -euo pipefail
(($# >= 4)) || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
target=$1 conversations=$2 prompts=$3
overrides=("${@:4}" name=mine model=custom "model.target.name=$target")
overrides+=("data.path=$conversations" "data.prompts=$prompts")

python -m data.report "${overrides[@]}"       # rejected records, fraction of supervised tokens, lengths
python -m train "${overrides[@]}" plan=true   # memory, hours, disk; stops here if they exceed this machine
python -m train "${overrides[@]}"
python -m models.verify checkpoints/mine/export "$target"
