# What the job scripts of this folder have in common. They source it, from the checkout that sbatch was started in: Slurm runs a copy of them.
# From them: RUN_DIR, and the words given to sbatch, of which a run_dir= goes over it. From whoever submits, all of it with a default:
#   VENV             a Python environment, .venv                          NFT            the whole command instead, e.g. python3 -m megatron_nft
#   CONTAINER_IMAGE  an image for Pyxis, none; then VENV is not used      MAX_FAILURES   starts in a row that save nothing new, 3
#   CONTAINER_MOUNTS what it sees besides the checkout: MODEL, TRAIN ...   CACHE          node-local folder of the compilers' caches, /tmp
#   PREFLIGHT        more flags of preflight, e.g. --changed
# What else is in the submitting shell (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, GLOO_SOCKET_IFNAME of your network) reaches the ranks, too.
mistake() { echo "megatron-nft: $*" >&2 && exit 2; }  # of the user's: the job is not started again
whole() { [[ ${!1} =~ ^[0-9]+$ ]] || mistake "$1 is ${!1}: give a whole number"; }
# Slurm's controller may be busy. The 0 is needed: within a trap a bare `return` gives the code from before the trap.
patiently() { local try; for try in 1 2 3; do if "$@"; then return 0; fi; sleep 5; done; return 1; }
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# The run's directory: the last word counts, as it does for the run.
for word in "$@"; do
  if [[ $word == run_dir=* ]]; then RUN_DIR=${word#run_dir=}; fi
done
# Where a rank notes that it ends with 2, a mistake of the user's. srun's own code is the highest of all ranks', also of those that it kills.
export MEND=$RUN_DIR/mend-$SLURM_JOB_ID
{ mkdir -p "$RUN_DIR" && : >"$MEND"; } \
  || mistake "run_dir $RUN_DIR cannot be made or written: name one of your own (for a container mount it under the same path)"

# How many starts in a row have ended without a new checkpoint, and which the newest was then. A new submission begins to count anew.
MAX_FAILURES=${MAX_FAILURES:-3} failures=$RUN_DIR/failures
whole MAX_FAILURES
newest() { find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort -V | tail -n 1 || true; }
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then echo "0 $(newest)" >"$failures"; fi

# Where the ranks meet: the first node, at a port below those that a kernel hands out, and another one for each job.
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# The same command bare and in a container. Its name is the job's own: two jobs on a node do not share one, and the steps of a job do.
container=()
if [ -n "${CONTAINER_IMAGE:-}" ]; then
  if [ -f "$CONTAINER_IMAGE" ]; then CONTAINER_IMAGE=$(realpath "$CONTAINER_IMAGE"); fi  # Pyxis takes a relative path for a registry's name
  container=(--container-image="$CONTAINER_IMAGE" --container-name="nft-$SLURM_JOB_ID" --container-workdir="$PWD"
             --container-mounts="$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
  NFT=${NFT:-python3 -m megatron_nft}
fi
read -ra nft <<<"${NFT:-${VENV:-.venv}/bin/python -m megatron_nft}"
if [ -z "${CONTAINER_IMAGE:-}" ] && ! command -v "${nft[0]}" >/dev/null; then
  mistake "there is no ${nft[0]} on $(hostname): set VENV or NFT, or \`make setup\` on a file system that all nodes see"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# Caches of compiled kernels are the job's own, on each node's disk: many nodes that write one on a shared file system wait for its locks, and
# another job's may be of other versions. The hub's cache (HF_HOME, with your models and token) stays where it is.
cache=${CACHE:-/tmp}/nft-$SLURM_JOB_ID
export VLLM_CACHE_ROOT=$cache/vllm TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor HF_DATASETS_CACHE=$cache/datasets
export FLASHINFER_WORKSPACE_BASE=$cache/flashinfer CUDA_CACHE_PATH=$cache/cuda

# A rank has its share of a node's CPUs, in the order of the ranks: the first half on the first socket, as the GPUs are. Threads that wander
# to the other socket make copies to the host, and the launching of kernels, slower.
cpus=$((SLURM_CPUS_ON_NODE / SLURM_NTASKS_PER_NODE))
bound=(--cpu-bind=cores --distribution=block:block)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus < 8 ? cpus : 8))}  # more threads than CPUs would only wait for each other
export PYTHONUNBUFFERED=1  # a line is in the log when it is printed, not when a buffer is full

gpus=${SLURM_GPUS_PER_NODE:-0} gpus=${gpus##*:}  # of a node: a number, or kind:number
planned=(plan.nodes="$SLURM_JOB_NUM_NODES" plan.gpus_per_node="$gpus")  # this allocation, whatever the config was planned for
gpu_settings() {
  export CUDA_DEVICE_MAX_CONNECTIONS=1  # kernels start in the order they were queued: Megatron's overlap of communication rests on it
  export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}  # buffers on each communicator, of which Megatron and vLLM have dozens: memory for answers
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # its warnings name the adapter or the peer; INFO: which network it chose
  unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF  # expandable segments exclude vLLM's sleep, which gives the memory to the trainer
  local ours  # an image's own variables would go over these
  ours=$(compgen -e | grep -E '^(CUDA_DEVICE_MAX_CONNECTIONS|NCCL_.*|GLOO_.*|OMP_NUM_THREADS|PYTHONPATH|PYTHONUNBUFFERED)$' | paste -sd,)
  if [ "${#container[@]}" != 0 ]; then container+=(--container-env="$ours"); fi
}

# ranks HOSTS SRUN-FLAGS... -- WORDS...: megatron-nft WORDS as one rank a task; all of them end when one fails (--kill-on-bad-exit). Its exit
# code is in `code`. In the background, because bash runs traps only between commands, and a rank that saves must be waited for.
ranks() {
  local on=$1 nodes interrupted flags=() rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS ended=0
    trap : USR1 TERM  # the program answers them
    "$@" || ended=$?
    if [ $ended = 2 ] || [ $ended = 127 ]; then echo "$RANK" >>"$MEND"; fi  # 127: there is no such program
    exit $ended'
  shift
  while [ "$1" != -- ]; do flags+=("$1") && shift; done
  shift
  if [ -n "$asked" ]; then code=75 && return; fi
  nodes=$(wc -w <<<"$on")
  srun --nodes="$nodes" --nodelist="${on// /,}" --ntasks=$((nodes * SLURM_NTASKS_PER_NODE)) --ntasks-per-node="$SLURM_NTASKS_PER_NODE" \
    --cpus-per-task="$cpus" "${bound[@]}" --kill-on-bad-exit=1 "${flags[@]}" "${container[@]}" bash -c "$rank" rank "${nft[@]}" "$@" &
  running=$! interrupted=yes
  if [ -n "$asked" ]; then stop; fi  # since the look above: srun was not known yet
  while [ -n "$interrupted" ]; do  # by a signal, which ends `wait` and not srun
    interrupted='' code=0
    wait $running || code=$?
  done
  running=''
  if [ -n "$asked" ] && [ "$1" = preflight ]; then code=75; fi  # nothing has begun: no failure, whatever the signal made of it
}
running='' asked='' code=0
stop() {
  asked=yes interrupted=yes
  if [ -z "$running" ]; then return; fi
  kill -USR1 "$running" || true
  { sleep 5 && kill -USR1 "$running"; } >/dev/null 2>&1 &  # a srun that has only just started may miss the first one
}
trap stop USR1 TERM  # srun hands USR1 to every rank: the run saves, and ends with 75

# A job that is cancelled can start nothing more, and leaves its caches and its container. The user's next job on the node
# removes what no process there belongs to.
everywhere=(srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
sweep='
  ended() { [[ $1 =~ ^[0-9]+$ ]] && ! grep -qszxF "SLURM_JOB_ID=$1" /proc/[0-9]*/environ; }
  for left in "$0"/nft-*; do if [ -O "$left" ] && ended "${left##*/nft-}"; then rm -rf "$left"; fi; done
  for left in $(enroot list 2>/dev/null); do if ended "${left#pyxis_nft-}"; then enroot remove -f "$left"; fi; done'
"${everywhere[@]}" bash -c "$sweep" "${CACHE:-/tmp}" || true

# The end of a start. A run that was stopped (75) or failed goes back into the queue and resumes from its newest checkpoint; not after a mistake
# of the user's (2, of whichever rank), which the next start would find again, nor when MAX_FAILURES starts in a row have saved nothing new.
finish() {
  local count=0 before='' last state
  if grep -q . "$MEND" 2>/dev/null; then code=2; fi
  rm -f "$MEND"
  "${everywhere[@]}" rm -rf "$cache" 2>/dev/null || true
  if [ -n "${CONTAINER_IMAGE:-}" ]; then "${everywhere[@]}" enroot remove -f "pyxis_nft-$SLURM_JOB_ID" 2>/dev/null || true; fi
  if [ "$code" = 0 ]; then rm -f "$failures" && exit 0; fi
  if [ "$code" = 2 ]; then
    rm -f "$failures"
    rmdir "$RUN_DIR" 2>/dev/null || true  # nothing has begun in it
    echo "not started again: mend what is said above, then submit anew" && exit 2
  fi
  state=$(patiently squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) \
    || { echo "ended with $code, and squeue does not say whether the job was cancelled: submit anew"; exit "$code"; }
  if [ "$state" != RUNNING ]; then exit "$code"; fi  # cancelled or preempted
  last=$(newest)
  if [ -f "$failures" ]; then read -r count before <"$failures"; fi
  if [ "$last" = "$before" ]; then count=$((count + 1)); else count=0; fi
  echo "$count $last" >"$failures"
  if [ "$count" -ge "$MAX_FAILURES" ]; then
    echo "stopped: $count starts in a row saved nothing new, the last one ended with $code; submit anew when that is mended"
    exit "$code"
  fi
  echo "ended with $code: back into the queue, to go on from ${last:-the beginning}"
  patiently scontrol requeue "$SLURM_JOB_ID" || echo "scontrol could not do it: submit anew"
  exit "$code"
}
