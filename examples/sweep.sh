#!/usr/bin/env bash
# Run every combination of block size and learning rate; print a table of all runs at the end.
#
#   examples/sweep.sh +experiment=tiny [override ...]
#
# Each run has a separate directory, checkpoints/sweep_<block size>_<learning rate>. On a cluster, add
# hydra/launcher=submitit_slurm (docs/guide/cluster.md) to submit each run as a job.
set -euo pipefail
(($# >= 1)) || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }

# shellcheck disable=SC2016  # Hydra expands these
python -m train -m "$@" \
    model.draft.block_size=4,8 \
    stage.attention_tuning.module.learning_rate=2e-3,5e-3 \
    'name=sweep_${model.draft.block_size}_${stage.attention_tuning.module.learning_rate}'
