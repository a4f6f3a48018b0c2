#!/bin/sh
# Record studies on the GPUs of one machine: those of a GPU one after the other, all GPUs at once.
#
#   PYTHONPATH=src studies/record.sh DATA OUT "share-kv=300 position=490" "experts=300 balance=490"
#
# The n-th list runs on GPU n - 1; each study begins its last run so many seconds after the start,
# and then measures and reports what is finished. Run it again to go on: nothing is repeated.
# OUT gets STUDY.tar.gz (all but checkpoints) and a log for each GPU. From the environment: FOLDER,
# where the studies run (OUT/runs); JOBS, runs side by side (5); PYTHON; SETTINGS, key=value for all.
set -u
data=$1 out=$2
shift 2
folder=${FOLDER:-$out/runs} begun=$(date +%s)
mkdir -p "$out" "$folder"

record() { # GPU "STUDY=SECONDS ..."
    for timed in $2; do
        study=${timed%=*}
        left=$((${timed#*=} - $(date +%s) + begun))
        minutes=$((left > 0 ? left / 60 : 0)).$((left > 0 ? left % 60 / 6 : 0))
        CUDA_VISIBLE_DEVICES=$1 "${PYTHON:-python3}" -m fathom ladder "$study" --minutes "$minutes" \
            --out "$folder/$study" --jobs "${JOBS:-5}" "data.source=$data" ${SETTINGS:-}
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
