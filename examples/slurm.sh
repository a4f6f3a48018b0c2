#!/bin/bash
# Four nodes of eight GPUs under SLURM, one launcher per node:  sbatch examples/slurm.sh
#SBATCH --job-name=fathom
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@300  # five minutes before the end: the ranks finish their step and save
#SBATCH --requeue
set -euo pipefail

MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m fathom train my-run.toml --out /shared/runs/my-run \
  parallel.dp=4 parallel.ep=8 parallel.shard=32 &
LAUNCHER=$! OUT_OF_TIME=
trap 'OUT_OF_TIME=1; kill -TERM $LAUNCHER' TERM
wait $LAUNCHER || true  # a signal ends this wait
if [ -n "$OUT_OF_TIME" ]; then
  wait $LAUNCHER || true
  scontrol requeue "$SLURM_JOB_ID"  # it goes on from what was saved
fi
