#!/bin/bash
# Trains on several hosts under Slurm. Arguments are those of `nmt train`:
#
#   sbatch scripts/slurm.sh experiment=wmt14_en_de_moe_32 training.micro_batches=16
#   sbatch --nodes=8 --time=12:00:00 scripts/slurm.sh experiment=wmt14_en_fr_moe_2048 parallel.expert_group_size=8
#
# Submit it from the top of the clone. The clone with its .venv, data/ and runs/ must lie on a file system that all
# hosts see under the same path: each process writes its share of every checkpoint there and reads its share back.
# training.micro_batches must be a multiple of the number of GPUs.
#
# The hosts need a network that only you can reach: torchrun listens on all networks, and runs what it is sent
# (SECURITY.md).
#
# Before the time limit the processes are told to stop: they finish the update and save, and the job goes back to the
# queue, where the same command goes on from that checkpoint. A job that Slurm itself puts back, for a host that failed
# or a job of higher priority, goes on from its last checkpoint. One that fails or is cancelled does not come back.

#SBATCH --job-name=nmt
#SBATCH --nodes=2
# One task for each host: torchrun, which starts one process for each of the host's GPUs.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
# The memory and the network port of a host are not shared with other jobs.
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the limit, to this script alone (B:), as USR1, since TERM also comes when somebody cancels the job.
# A model whose checkpoint takes longer to write needs more.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
# After a return to the queue the log goes on.
#SBATCH --open-mode=append
#SBATCH --output=nmt-%j.log

set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
test -x .venv/bin/torchrun || { echo "slurm.sh: no .venv in $PWD: run make setup there first" >&2; exit 2; }

# A file of this folder, such as yaml.py, is no module of the program.
export PYTHONSAFEPATH=1

# torchrun passes a signal on and kills what has not ended after so many seconds; it would wait 30. (A PyTorch that does
# not know the variable does wait 30: then a checkpoint that takes longer is lost, and the one before it counts.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110

# Needed only where a host has several networks and PyTorch picks one that the other hosts do not reach (training then
# hangs at its start): name the right interface, as `ip -brief address` lists them. The first is for GPUs, the second
# for the few numbers that the hosts exchange. With InfiniBand, GPUs find it by themselves.
#export NCCL_SOCKET_IFNAME=ib0
#export GLOO_SOCKET_IFNAME=ib0
# Says which network and which links NCCL chose:
#export NCCL_DEBUG=INFO
# OMP_NUM_THREADS stays unset: torchrun makes it 1, enough where the GPUs compute.

# `scancel` sends TERM to every torchrun of step 0, the srun below; srun itself would abort the step on a signal.
stopping=false
trap 'stopping=true; scancel --signal=TERM "$SLURM_JOB_ID.0" || true' USR1

# Once, on this host, rather than by one process while the others wait.
.venv/bin/nmt prepare "$@"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# In the background, because bash runs a trap only between commands, or in `wait`, which it then ends early.
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
    # Status 0: the last update was done before the signal came.
    if ((status)); then
        echo "slurm.sh: stopped before the time limit; back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
