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
checkpoints=(
    Models_Softmax/CIFAR10_Softmax.pth.tar
    Models_PCL/CIFAR10_PCL.pth.tar
    Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar
    Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar
)
cache=compiled  # where torch.compile keeps what it has made, in slices: the next one need not wait for it
grace=30  # seconds at most that a script may take to save, once told to stop

unfinished() { # CHECKPOINT ...
    "$PYTHON" -c 'if True:
        import checkpoints, pathlib, sys
        for path in sys.argv[1:]:
            if not (pathlib.Path(path).exists() and checkpoints.load(path).get("finished")):
                print(path)' "$@"
}

carry() { # whatever ended the slice
    for file in "${checkpoints[@]/%.pth.tar/.*}" results/robustness*; do
        for found in $file; do
            case $found in *.tmp | *.previous | *.lock) continue ;; esac
            [ -f "$found" ] || continue
            mkdir -p "$folder/$(dirname "$found")"
            cp -p "$found" "$folder/$found.part" && mv "$folder/$found.part" "$folder/$found"
        done
    done
    if [ -d "$cache" ]; then
        mkdir -p "$folder" && rm -rf "$folder/$cache.part"
        cp -rp "$cache" "$folder/$cache.part" && rm -rf "$folder/$cache"
        mv "$folder/$cache.part" "$folder/$cache"
    fi
    large=$(find "$folder" -type f -size +16M 2> /dev/null) || true
    [ -z "$large" ] || echo "over 16 MB: $large" >&2
}

slice_over() {
    echo "slice over; the same command goes on"
    exit 0
}

bounded() { # COMMAND ...: run it, but end the slice where that takes too long
    [ -n "$minutes" ] || { "$@"; return; }
    left=$((limit - SECONDS))
    [ $left -gt 0 ] || slice_over
    status=0
    timeout --foreground --preserve-status -s TERM -k $grace $left "$@" || status=$?
    case $status in
        0) ;;
        75 | 137 | 143) slice_over ;;
        *) exit $status ;;
    esac
}

stage() { # SCRIPT CHECKPOINT
    [ -z "$minutes" ] || grep -qxF "$2" <<< "$todo" || return 0  # finished: no need to read the images again
    bounded "$PYTHON" "$1.py" --resume "${data[@]}" "${train[@]}"
}

if [ -n "$minutes" ]; then
    limit=$("$PYTHON" -c 'import sys; print(round(60 * float(sys.argv[1])))' "$minutes")
    export TORCHINDUCTOR_CACHE_DIR=$PWD/$cache
    trap carry EXIT
    [ ! -d "$folder" ] || cp -rpu "$folder/." .
    todo=$(unfinished "${checkpoints[@]}")
fi
stage softmax_training "${checkpoints[0]}"
stage pcl_training "${checkpoints[1]}"
stage pcl_training_adversarial_fgsm "${checkpoints[2]}"
stage pcl_training_adversarial_pgd "${checkpoints[3]}"
bounded "$PYTHON" robustness.py --resume "${data[@]}"
echo "complete"
