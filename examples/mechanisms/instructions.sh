#!/bin/sh
# Where an instruction is carried, over the steps of one model's training: prepared, not run. The
# weights have to be on disk: OLMo-2-0425-1B with its SFT and DPO steps is the cheap start, Olmo-3-7B
# base, SFT and DPO what was published (logits gained by the best pair of layers: can_fly about 11,
# adjectives 3 to 4 after SFT and DPO, about 0 in the base).
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
        saesteer patch --model "$MODEL" --pairs "contrast:$WORDS" --vector --sets 3 --budget 120 \
            -o "$OUT/$NAME-$WORDS-vector"
        saesteer patch --model "$MODEL" --pairs "contrast:$WORDS" --vector --sets 2 --budget 120 \
            --doses 0.25,0.5,1 -o "$OUT/$NAME-$WORDS-doses"
        saesteer patch --model "$MODEL" --pairs "contrast:$WORDS" \
            --knock instruction:query,instruction:last,query:last -o "$OUT/$NAME-$WORDS-cut"
    done
done
