#!/bin/sh
# Entity tracking in a base and fine-tuned models of one form (Prakash et al. 2024): prepared, not
# run. Needs a GPU with about 60 GB and the weights on disk: LLaMA-7B as base, and Vicuna-7B,
# Goat-7B or FLoat-7B as tuned.
#
#   BASE=/models/llama-7b TUNED="/models/vicuna-7b /models/goat-7b" \
#       sh examples/mechanisms/entity_tracking.sh
set -eu
: "${BASE:?the folder of the base model}" "${TUNED:?folders of tuned models, with spaces between}"
OUT=${OUT:-runs/entity-tracking}

for MODEL in "$BASE" $TUNED; do
    NAME=$(basename "$MODEL")
    # Published: circuits of 40, 7, 20 and 5 heads; accuracy .66 (LLaMA), .67 (Vicuna), .82 (Goat).
    saesteer circuit --model "$MODEL" --pairs boxes:7 --n 300 --top 40,7,20,5 --keep 1 \
        --score prob --ablate resample -o "$OUT/$NAME"
    # Masks: object at the last token, position there and at the label, label at the label.
    saesteer circuit --model "$MODEL" --pairs boxes:7 --n 1000 --top 40,7,20,5 --keep 1 \
        --ablate resample --draws 0 --random 0 --mask last,query-label \
        --desiderata boxes:7:object,boxes:7:position,boxes:7:label -o "$OUT/$NAME-masks"
    saesteer patch --model "$MODEL" --pairs boxes:7 --n 100 --metric accuracy \
        --knock prev-label:query-label,object:last,query-label:last -o "$OUT/$NAME-cut"
done
for MODEL in $TUNED; do
    NAME=$(basename "$MODEL")
    saesteer circuit --model "$BASE" --pairs boxes:7 --n 300 --top 40,7,20,5 --keep 1 \
        --ablate resample --cross "$MODEL" -o "$OUT/cross-$NAME"
done
