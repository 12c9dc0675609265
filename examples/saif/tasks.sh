#!/bin/sh
# Find, dose and evaluate several instructions with one SAE, then write a page of what was measured.
#
#     sh examples/saif/tasks.sh runs/saif/sae/layer-20_dsae-4608_k-32_seed-0 page.md
#
# The SAE's training must have held replies to these tasks (examples/saif/prepare.py). Set TASKS,
# CONTENTS (to rank with), N (test contents) and EXTRA (flags of evaluate) to change the size.
set -e
sae=$1
page=$2
out=${OUT:-runs/saif}
for task in ${TASKS:-french german json question python}; do
    saesteer rank --sae "$sae" --task "$task" --read reply --rank-contents "${CONTENTS:-48}" \
        --top 15 ${RANK:-} -o "$out/plan-$task" --force
    saesteer sweep --plan "$out/plan-$task" --grid k=1,3,5 --grid scale=1,1.5,2 --grid scope=all \
        --rounds "${ROUNDS:-12:3,40:1}" -o "$out/sweep-$task" --force
    saesteer evaluate --plan "$out/sweep-$task" --n "${N:-40}" ${EXTRA:-} \
        -o "$out/report-$task" --force
done
python "$(dirname "$0")/page.py" --head "$(dirname "$0")/head.md" --reports "$out"/report-* \
    --rankings "$out"/plan-* --results "$out/results" -o "$page"
