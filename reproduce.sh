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
[ -z "$minutes" ] || limit=$("$PYTHON" -c 'import sys; print(round(60 * float(sys.argv[1])))' "$minutes")

seconds_left() { echo $((limit - SECONDS)); }

unfinished() { # CHECKPOINT ...
    "$PYTHON" -c 'if True:
        import pathlib, sys, utils
        for path in sys.argv[1:]:
            if not (pathlib.Path(path).exists() and utils.load_checkpoint(path).get("finished")):
                print(path)' "$@"
}

carry() {
    [ -n "$minutes" ] || return 0
    for output in "${outputs[@]}"; do
        [ -d "$output" ] && mkdir -p "$folder/$output" && find "$output" -type f ! -name '.*' ! -name '*.previous' \
            -exec cp -p {} "$folder/$output/" \;
    done
    mkdir -p "$folder"
    large=$(find "$folder" -type f -size +16M)
    [ -z "$large" ] || echo "over 16 MB: $large" >&2
}

stage() { # SCRIPT CHECKPOINT
    if [ -n "$minutes" ]; then
        grep -qxF "$2" <<< "$todo" || return 0  # finished: no need to read the images again
        [ "$(seconds_left)" -gt 0 ] || stop
        "$PYTHON" "$1.py" --resume "${data[@]}" "${train[@]}" --max-minutes "$(seconds_left)/60"
        [ "$(seconds_left)" -gt 0 ] || stop  # with time left it ends when it is finished, and only then
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
checkpoints=(
    Models_Softmax/CIFAR10_Softmax.pth.tar
    Models_PCL/CIFAR10_PCL.pth.tar
    Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar
    Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar
)
[ -z "$minutes" ] || todo=$(unfinished "${checkpoints[@]}")
stage softmax_training "${checkpoints[0]}"
stage pcl_training "${checkpoints[1]}"
stage pcl_training_adversarial_fgsm "${checkpoints[2]}"
stage pcl_training_adversarial_pgd "${checkpoints[3]}"
if [ -n "$minutes" ]; then
    [ "$(seconds_left)" -gt 0 ] || stop
    status=0
    timeout --preserve-status -s TERM "$(seconds_left)" "$PYTHON" robustness.py --resume "${data[@]}" || status=$?
    [ $status != 143 ] || stop
    [ $status = 0 ] || exit $status
else
    "$PYTHON" robustness.py --resume "${data[@]}"
fi
carry
echo "complete"
