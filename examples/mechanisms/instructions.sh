#!/bin/sh
# Where an instruction is carried, over the steps of one model's training: prepared, not run here.
# The weights have to be on disk.
#
#   MODELS="/models/olmo2-1b /models/olmo2-1b-sft /models/olmo2-1b-dpo" \
#       sh examples/mechanisms/instructions.sh
set -eu
: "${MODELS:?folders of models, with spaces between them}"
OUT=${OUT:-runs/instructions}

for MODEL in $MODELS; do
    NAME=$(basename "$MODEL")
    for WORDS in adjectives animals; do
        saesteer patch --model "$MODEL" --pairs "contrast:$WORDS" --site resid_post,attn_out,mlp_out \
            --at instruction,query-first,query,last -o "$OUT/$NAME-$WORDS-stream"
        saesteer patch --model "$MODEL" --pairs "contrast:$WORDS" --site z --at last,query \
            -o "$OUT/$NAME-$WORDS-heads"
        saesteer trace --model "$MODEL" --pairs "contrast:$WORDS" --at instruction \
            -o "$OUT/$NAME-$WORDS-traces"
    done
done
