#!/bin/sh
# Entity tracking in a base and a fine-tuned model of one form (Prakash et al. 2024): prepared, not
# run here. Needs a GPU with about 60 GB and the weights on disk.
#
#   BASE=/models/llama-7b TUNED=/models/goat-7b sh examples/mechanisms/entity_tracking.sh
set -eu
: "${BASE:?the folder of the base model}" "${TUNED:?the folder of the tuned model}"
OUT=${OUT:-runs/entity-tracking}

for MODEL in "$BASE" "$TUNED"; do
    NAME=$(basename "$MODEL")
    saesteer circuit --model "$MODEL" --pairs boxes:7 --n 300 --top 40,7,20,5 --keep 1 \
        --mask last --ablate resample -o "$OUT/$NAME"
done
saesteer circuit --model "$BASE" --pairs boxes:7 --n 300 --top 40,7,20,5 --keep 1 \
    --ablate resample --cross "$TUNED" -o "$OUT/cross"
