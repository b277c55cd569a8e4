#!/usr/bin/env bash
# RAFT: fine-tune a policy on the best of its own answers, round after round.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recipes/raft.sh --policy P --prompts FILE --dir D [OPTION ...] ARGUMENT ...

RAFT (arXiv 2304.06767): in each round the policy answers every prompt rollout.samples_per_prompt
times, the reward scores the answers, and the policy is fine-tuned on the best answer to each prompt.
It is SuperHF (arXiv 2310.16763) without its penalty for leaving the first policy.

TEXT
    common_options
    cat <<'TEXT'
Example: bash launch/recipes/raft.sh --policy runs/sft --prompts prompts.jsonl --dir runs/raft \
    --config F reward.source=runs/reward rollout.samples_per_prompt=8 run.epochs=1
TEXT
}

own_option() { return 1; }

# shellcheck source=launch/recipes/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
for ((round = 1; round <= rounds; round++)); do
    here=$dir/round_$round
    answer "$here" "$policy" "$round"
    choose "$here" demos.jsonl --rule best
    step sft model.init="$policy" data.train_path="$here/demos.jsonl" run.dir="$here/policy"
    policy=$here/policy
done
finish "$policy"
