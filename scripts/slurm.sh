#!/bin/bash
# Train on several hosts under Slurm. The arguments are those of `nmt train`:
#
#   sbatch scripts/slurm.sh experiment=wmt14_en_de_moe_32 training.micro_batches=16
#   sbatch --nodes=8 --time=12:00:00 scripts/slurm.sh experiment=wmt14_en_fr_moe_2048 parallel.expert_group_size=8
#
# Submit it from the top of the clone. The clone with its .venv, data/ and runs/ must be on a file system that all hosts
# see under the same path. Each process writes its share of every checkpoint there and reads its share back.
# training.micro_batches must be a multiple of the number of GPUs.
#
# The hosts need a network that only you can reach: torchrun listens on all networks and executes what it receives
# (SECURITY.md).
#
# Shortly before the time limit, the processes get a signal. They finish the step and save, and the job returns to the
# queue, where the same command resumes from that checkpoint. If Slurm requeues a job itself, because a host failed or a
# job has higher priority, it resumes from its last checkpoint. Jobs that fail or are cancelled are not requeued.

#SBATCH --job-name=nmt
#SBATCH --nodes=2
# One task per host: torchrun, which starts one process per GPU of the host.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
# Other jobs must not share the memory and the network port of a host.
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the limit, Slurm sends USR1 to this script only (B:). TERM would be ambiguous: Slurm also sends it
# when somebody cancels the job. Allow more time if a checkpoint takes longer to write.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# Append to the log after a requeue.
#SBATCH --open-mode=append
#SBATCH --output=nmt-%j.log

set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
test -x .venv/bin/torchrun || { echo "slurm.sh: no .venv in $PWD: run make setup there first" >&2; exit 2; }

# Files in this folder, such as a yaml.py, must not shadow modules of the program.
export PYTHONSAFEPATH=1

# torchrun forwards a signal and kills processes that have not ended after this many seconds; the default is 30. PyTorch
# versions that ignore the variable wait 30 seconds: a checkpoint that takes longer is lost; the previous one counts.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

# Needed only if a host has several networks and PyTorch picks one that the other hosts cannot reach, so that training
# hangs at its start. Name the right interface, as listed by `ip -brief address`. The first variable is for GPUs, the
# second for the few numbers that hosts exchange. GPUs find InfiniBand by themselves.
#export NCCL_SOCKET_IFNAME=ib0
#export GLOO_SOCKET_IFNAME=ib0
# Prints which network and links NCCL uses:
#export NCCL_DEBUG=INFO
# OMP_NUM_THREADS stays unset: torchrun sets it to 1, which is enough for training on GPUs.

# `scancel` sends TERM to every torchrun of step 0, which the srun below starts. srun itself would abort the step on a
# signal.
stopping=false
trap 'stopping=true; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1

# Prepare once on this host, so that the processes need not wait for one of them.
.venv/bin/nmt prepare "$@"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# In the background, because bash runs a trap only between commands or in `wait`, which then returns early.
srun .venv/bin/torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node=gpu \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head:29500" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m nmt.cli train "$@" &
step=$!
status=0
wait "$step" || status=$?
if $stopping; then
    status=0
    wait "$step" || status=$?
    # Status 0: training had finished before the signal arrived.
    if ((status)); then
        echo "slurm.sh: stopped before the time limit; requeued"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
