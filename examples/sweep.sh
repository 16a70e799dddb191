#!/usr/bin/env bash
# One run for each choice of block size and learning rate; ends with a table of all runs.
#
#   examples/sweep.sh +experiment=tiny [override ...]
#
# Each run has a directory of its own, checkpoints/sweep_<block size>_<learning rate>. On a cluster, add
# hydra/launcher=submitit_slurm (docs/guide/cluster.md): each run becomes a job.
set -euo pipefail
(($# >= 1)) || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }

# shellcheck disable=SC2016  # Hydra expands these
python -m train -m "$@" \
    model.draft.block_size=4,8 \
    stage.attention_tuning.module.learning_rate=2e-3,5e-3 \
    'name=sweep_${model.draft.block_size}_${stage.attention_tuning.module.learning_rate}'
