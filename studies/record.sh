#!/bin/sh
# Record studies on the GPUs of one machine: those of a GPU one after the other, all GPUs at once.
#
#   PYTHONPATH=src studies/record.sh DATA OUT MINUTES "share-kv position" "experts balance"
#
# The n-th list of studies runs on GPU n - 1, and each study begins its last run MINUTES after the
# list began, shared out evenly; what a study leaves over is the next one's. Run it again to go on:
# what is finished is not repeated. OUT gets STUDY.tar.gz (all but checkpoints) and a log a GPU.
# SETTINGS: further key=value for every study. FOLDER: where the studies run (default: OUT/runs).
set -u
data=$1 out=$2 minutes=$3
shift 3
folder=${FOLDER:-$out/runs}
mkdir -p "$out" "$folder"

record() { # GPU "STUDY ..."
    begun=$(date +%s) left=$(echo $2 | wc -w)
    for study in $2; do
        seconds=$((minutes * 60 - $(date +%s) + begun))
        share=$((seconds > 0 ? seconds / left : 0)) left=$((left - 1))
        CUDA_VISIBLE_DEVICES=$1 ${PYTHON:-python3} -m fathom ladder "$study" \
            --out "$folder/$study" --jobs "${JOBS:-5}" \
            --minutes "$(echo $share | awk '{print $1 / 60}')" "data.source=$data" ${SETTINGS:-}
        tar -C "$folder" --exclude=checkpoints --exclude=.lock -czf "$out/$study.tar.gz" "$study"
    done
}

gpu=0
for studies in "$@"; do
    record $gpu "$studies" >"$out/gpu$gpu.log" 2>&1 &
    gpu=$((gpu + 1))
done
wait
tail -n 3 "$out"/gpu*.log
