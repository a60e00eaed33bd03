#!/bin/bash
# Stands in for megatron-nft (NFT=): writes down where and how it was started, and ends as $ENDS says for its command: with a code, or, at
# "asked", with 75 when it is asked to. At the start with the number $SAVES_AT training leaves a checkpoint, by its name.
trap '' USR1 TERM # the launcher's, when another rank has ended first
echo "$1 on=$SLURMD_NODENAME rank=${RANK:-} of=${WORLD_SIZE:-} local=${LOCAL_RANK:-} at=${MASTER_ADDR}:${MASTER_PORT} restart=${SLURM_RESTART_COUNT:-0}\
 cache=$TRITON_CACHE_DIR gpus=${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-}} words=$*" >>"$STARTS"
if [ "$1 ${SLURM_RESTART_COUNT:-0}" = "train ${SAVES_AT:-}" ]; then mkdir -p "$RUN_DIR/checkpoints/step_2"; fi
mkdir -p "$TRITON_CACHE_DIR"
for rule in $ENDS; do
  if [ "${rule%%=*}" = "$1" ]; then ends=${rule#*=}; fi
done
if [ "${ends:-0}" != asked ]; then exit "${ends:-0}"; fi
trap 'exit 75' USR1 TERM
for ((i = 0; i < 600; i++)); do sleep 0.1; done
