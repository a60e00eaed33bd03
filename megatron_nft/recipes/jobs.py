"""The bash of a job: what each task runs, and what the batch script does before. slurm/job.sh has what is common with slurm/*.sbatch."""

import shlex

_TASK = """
preflight=() expected=()
if [ -n "${SLURM_PROCID:-}" ]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  read -ra nft <<<"$NFT"
  if [ "$GPUS" != 0 ]; then  # this allocation, whatever the config was planned for
    expected=(--gpus-per-node "$GPUS")
    settings=("${settings[0]}" plan.nodes="$SLURM_JOB_NUM_NODES" plan.gpus_per_node="$GPUS" "${settings[@]:1}")
  fi
  preflight=(env MASTER_PORT=$((MASTER_PORT - 10000)))  # its own: a rank may begin to train while another one still leaves
else
  nft=("${VENV:-.venv}/bin/python")
  if [ "${RANKS:-1}" -gt 1 ]; then nft+=(-m torch.distributed.run --standalone --nproc-per-node="$RANKS"); fi
  nft+=(-m megatron_nft)
fi
ended() {  # a mistake of the user's is noted, as slurm/job.sh has it
  if { [ "$1" = 2 ] || [ "$1" = 127 ]; } && [ -n "${SLURM_PROCID:-}" ]; then echo "$RANK" >>"$MEND"; fi
  exit "$1"
}
trap 'exit 75' USR1  # the time is over before anything has begun: the next start does it
"${preflight[@]}" "${nft[@]}" preflight "${settings[@]}" ${PREFLIGHT:-} "${expected[@]}" || ended $?
trap : USR1 TERM  # the rank answers them
"${nft[@]}" train "${settings[@]}" || ended $?
"""

# Before NeMo-Run's srun. Its batch script ends with srun's code, on which `finish` requeues or does not. SRUN_CPUS_PER_TASK: srun's flag.
_SETUP = """
set +vx
cd "$checkout" && [ -f slurm/job.sh ] || { echo "no checkout of megatron_nft at $checkout: pass checkout=DIR"; exit 2; }
. slurm/job.sh
if [ "$gpus" != 0 ]; then gpu_settings; fi
export NFT="${nft[*]}" GPUS=$gpus SRUN_CPUS_PER_TASK=$cpus
trap 'code=$?; finish' EXIT
"""


def task(checkout: str, settings: list[str]) -> str:
    """Bash for every task: preflight, then training. `settings`: the words after `megatron-nft train`."""
    return f"set -euo pipefail\ncd {shlex.quote(checkout)}\nsettings=({shlex.join(settings)}){_TASK}"


def setup(checkout: str, run_dir: str, image: str | None) -> str:
    """Bash for the batch script, once: rendezvous, caches, and the end of a start (requeue, failures in a row), from slurm/job.sh."""
    given = {"checkout": checkout, "RUN_DIR": run_dir, "CONTAINER_IMAGE": image or ""}
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in given.items()) + _SETUP
