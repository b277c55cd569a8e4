#!/usr/bin/env bash
# ReST: grow a data set of answers, improve the policy on better and better parts of it, repeat.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/recipes/rest.sh --policy P --prompts FILE --dir D [OPTION ...] ARGUMENT ...

ReST (arXiv 2308.08998): each round grows a data set of rollout.samples_per_prompt scored answers to
every prompt, then improves the policy on it several times, by fine-tuning on the answers above a
threshold that rises.

  --thresholds LIST    scores, or percentages of the answers to leave out (default: 50%,75%,90%)
TEXT
    common_options
    cat <<'TEXT'
Example: bash launch/recipes/rest.sh --policy runs/sft --prompts prompts.jsonl --dir runs/rest \
    --config F reward.source=runs/reward rollout.samples_per_prompt=8 run.epochs=1
TEXT
}

thresholds=50%,75%,90%
own_option() {
    [[ $1 == --thresholds ]] && thresholds=$2
}

# shellcheck source=launch/recipes/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
read_options "$@"
for ((round = 1; round <= rounds; round++)); do
    here=$dir/round_$round number=0
    answer "$here" "$policy" "$round"
    for threshold in ${thresholds//,/ }; do
        number=$((number + 1))
        choose "$here" "demos_$number.jsonl" --rule above --threshold "$threshold"
        step sft model.init="$policy" data.train_path="$here/demos_$number.jsonl" \
            run.dir="$here/policy_$number"
        policy=$here/policy_$number
    done
done
finish "$policy"
