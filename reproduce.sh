#!/usr/bin/env bash
# The whole recipe, stage by stage, from where it stopped.
#
#   reproduce.sh [MINUTES [FOLDER]]
#
# With MINUTES it stops in time, everything saved, and copies what the next slice needs, on this machine or on a
# bare one, into FOLDER (default: carry), from where that slice takes it; run it until it says "complete".
# PYTHON is the interpreter; DATA and TRAIN are options for all scripts and for the training scripts, so that
#   DATA="--dataset synthetic" TRAIN="--depth 8 --epochs 1" reproduce.sh
# tries the whole thing in a minute or two.
set -euo pipefail
PYTHON=${PYTHON:-python3}
minutes=${1:-} folder=${2:-carry}
read -ra data <<< "${DATA:-}"
read -ra train <<< "${TRAIN:-}"
outputs=(Models_Softmax Models_PCL results)

seconds_left() { echo $((60 * minutes - SECONDS)); }

finished() {
    "$PYTHON" -c 'import sys, utils; sys.exit(not utils.load_checkpoint(sys.argv[1]).get("finished"))' "$1"
}

carry() {
    [ -n "$minutes" ] || return 0
    for output in "${outputs[@]}"; do
        [ -d "$output" ] && mkdir -p "$folder/$output" && find "$output" -type f ! -name '.*' ! -name '*.previous' \
            -exec cp -p {} "$folder/$output/" \;
    done
    large=$(find "$folder" -type f -size +16M)
    [ -z "$large" ] || echo "over 16 MB: $large" >&2
}

stage() { # SCRIPT CHECKPOINT
    if [ -n "$minutes" ]; then
        [ "$(seconds_left)" -gt 0 ] || stop
        "$PYTHON" "$1.py" --resume "${data[@]}" "${train[@]}" \
            --max-minutes "$(seconds_left)/60"
        finished "$2" || stop
    else
        "$PYTHON" "$1.py" --resume "${data[@]}" "${train[@]}"
    fi
}

stop() {
    carry
    echo "slice over; the same command goes on"
    exit 0
}

if [ -n "$minutes" ] && [ -d "$folder" ]; then
    cp -rpn "$folder/." .
fi
stage softmax_training Models_Softmax/CIFAR10_Softmax.pth.tar
stage pcl_training Models_PCL/CIFAR10_PCL.pth.tar
stage pcl_training_adversarial_fgsm Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar
stage pcl_training_adversarial_pgd Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar
if [ -n "$minutes" ]; then
    [ "$(seconds_left)" -gt 0 ] || stop
    timeout -s TERM "$(seconds_left)" "$PYTHON" robustness.py --resume "${data[@]}" || { [ $? = 143 ] && stop; }
else
    "$PYTHON" robustness.py --resume "${data[@]}"
fi
carry
echo "complete"
