#!/bin/sh
# What instruction tuning changed, between a base and its tuned model: prepared, not run here. The
# weights have to be on disk.
#
#   BASE=/models/llama-7b TUNED=/models/vicuna-7b sh examples/mechanisms/tuning.sh
set -eu
: "${BASE:?folder of the base model}" "${TUNED:?folder of the tuned model}"
OUT=${OUT:-runs/tuning}

for TASK in french json question uppercase; do
    saesteer attribute --model "$BASE" --tuned "$TUNED" --no-chat --task "$TASK" --n 32 \
        --budget 600 -o "$OUT/$TASK"
done
saesteer diff --base "$BASE" --tuned "$TUNED" --distance 0,1,8 -o "$OUT/weights"
