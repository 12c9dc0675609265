#!/bin/sh
# The paper's experiments with the SAEs that prepare.py trains, French, 20 contents each.
#
#     sh examples/saif/experiments.sh runs/saif/sae
#
# Latents are read at the model's replies and added everywhere at 1.5 times their mean activation,
# except in the second, which is the paper's own setting: last block, last prompt token, sensitivity.
# Set MIDDLE, LAST, WIDE, NARROW, OTHERS and K for another model's layers and SAEs.
set -e
saes=$1
wide=dsae-${WIDE:-4608}_k-${K:-32}_seed-0
narrow=dsae-${NARROW:-2304}_k-${K:-32}_seed-0
middle=$saes/layer-${MIDDLE:-20}
last=$saes/layer-${LAST:-29}
replies="--read reply --by rate --scale 1.5 --scope all"
run() { python "$(dirname "$0")/run.py" "$@" ${EXTRA:-}; }

run latents --sae "${middle}_$wide" $replies
run latents --sae "${last}_$wide"
set -- "${middle}_$wide" "${last}_$wide"
for layer in ${OTHERS:-10}; do set -- "$@" "$saes/layer-${layer}_$wide"; done
run layers --sae "$@" $replies --k 5
run width --sae "${middle}_$narrow" "${middle}_$wide" $replies --k 5
run position --sae "${middle}_$wide" $replies --k 5
run read --sae "${middle}_$wide" --scale 1.5 --scope all --k 5
run beta --sae "${middle}_$wide" --read reply --by rate --scope all --k 3
run variants --sae "${middle}_$wide" $replies --k 5
run logit-bias --sae "${last}_$wide" $replies --k 15
