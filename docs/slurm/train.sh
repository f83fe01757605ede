#!/usr/bin/env bash
# Train on several nodes under SLURM, again and again until the run is finished.
#
#   sbatch --nodes 2 --gpus-per-node 8 docs/slurm/train.sh --config pretrain/1b --output.dir runs/1b
#
# Submit it from the checkout, with the environment of `llmnorm` active; output.dir must be on a
# disk that all nodes share. README.md beside this file explains it. LAUNCHER names the engine:
#   LAUNCHER=configs/accelerate/zero3.yaml sbatch ...
#
#SBATCH --job-name=llmnorm
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

LAUNCHER=${LAUNCHER:-configs/accelerate/multinode.yaml}
STOPPED=75 # exit code of a run that has saved and wants to be started again

# A run file that is wrong ends here, before any node starts.
resolved=$(llmnorm validate --resolve "$@") || exit
run=$(sed -n '/^output:/,$ s/^  dir: //p' <<<"$resolved")
rm -f "$run/exit.json" # of the start before

export HEAD_NODE PORT LAUNCHER
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

# What runs on each node. A signal reaches the launcher, which would die of it; the ranks, its
# children, are to have it.
node() {
    accelerate launch --config_file "$LAUNCHER" \
        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
        --num_processes $((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1})) \
        --main_process_ip "$HEAD_NODE" --main_process_port "$PORT" --rdzv_backend static \
        train/pretrain.py "$@" &
    local launcher=$! code
    trap 'pkill -USR1 -P "$launcher"' USR1
    wait "$launcher"
    code=$?
    while kill -0 "$launcher" 2>/dev/null; do # a trapped signal ends `wait` early
        wait "$launcher"
        code=$?
    done
    return "$code"
}
export -f node

srun --ntasks-per-node=1 --wait=60 bash -c 'node "$@"' node "$@" &
step=$!
trap 'kill -USR1 "$step"' USR1
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    code=$?
done

# The launcher gives 1 for whatever went wrong; the run keeps its own code.
own=$(sed -n 's/.*"code": *\([0-9]*\).*/\1/p' "$run/exit.json" 2>/dev/null)
if [[ "$own" == "$STOPPED" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${own:-$code}"
