#!/usr/bin/env bash
# The benchmarks of this folder, one after the other, each with a time limit, ten minutes in all: their results as JSON to a folder, and at
# the end all ratios in a table. What fails is told, and the next one follows; the exit code is then 1.
#
#   PYTHON=python3 bash benchmarks/gpu/run_all.sh OUT [NAME ...]
#
# NAME: only these (logprobs, weight_stream, ...). PYTHON: the interpreter, with PYTHONPATH as it needs it. MODEL: a model's directory for
# mismatch. TINY=1: sizes that a CPU can do.
set -u
out=${1:?usage: PYTHON=python3 bash benchmarks/gpu/run_all.sh OUT [NAME ...]}
shift
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
names=${*:-logprobs weight_stream step_shares train_step generation mismatch efficiency}
mkdir -p "$out"
failed=

run() {  # name, seconds, arguments
  local name=$1 seconds=$2
  shift 2
  case " $names " in *" $name "*) ;; *) return ;; esac
  [ -f "$here/$name.py" ] || return
  [ -n "${TINY:-}" ] && set -- "$@" --tiny && seconds=1200
  echo "== $name, at most $seconds s"
  timeout --signal=TERM --kill-after=5 $((seconds + 15)) \
    "$python" "$here/$name.py" --json "$out/$name.json" --seconds "$seconds" "$@" || { echo "== $name FAILED with $?"; failed="$failed $name"; }
}

run logprobs 45
run weight_stream 60
run step_shares 75
run train_step 150 --profile "$out/profiles"
run generation 110
run mismatch 150 ${MODEL:+"$MODEL"}
run efficiency 60

echo
"$python" "$here/results.py" "$out" --ratios
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
