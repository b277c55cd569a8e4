#!/usr/bin/env bash
# Iterative DPO: preferences among the policy's own answers, round after round.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recipes/iterative_dpo.sh --policy P --prompts FILE --dir D [OPTION ...] ARGUMENT ...

Online iterative DPO as in RLHF Workflow (arXiv 2405.07863): in each round the policy answers every
prompt rollout.samples_per_prompt times, the reward scores the answers, and the policy learns to
prefer the best answer to each prompt over the worst, by marlhf preference against the first policy.

TEXT
    common_options
    cat <<'TEXT'
Example: bash launch/recipes/iterative_dpo.sh --policy runs/sft --prompts prompts.jsonl --dir runs/dpo \
    --config F reward.source=runs/reward rollout.samples_per_prompt=8 run.epochs=1
TEXT
}

own_option() { return 1; }

# shellcheck source=launch/recipes/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
first=$policy
for ((round = 1; round <= rounds; round++)); do
    here=$dir/round_$round
    answer "$here" "$policy" "$round"
    choose "$here" pairs.jsonl --rule best_worst
    step preference model.init="$policy" preference.reference="$first" \
        data.train_path="$here/pairs.jsonl" run.dir="$here/policy"
    policy=$here/policy
done
finish "$policy"
