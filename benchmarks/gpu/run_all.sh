#!/usr/bin/env bash
# The benchmarks of this folder, one after the other, each with a time limit, ten minutes in all: their results as JSON to a folder, and at
# the end all ratios in a table. What fails is told, and the next one follows; the exit code is then 1.
#
#   PYTHON=python3 bash benchmarks/gpu/run_all.sh OUT [NAME ...]
#
# NAME: only these (logprobs, weight_stream, ...). PYTHON: the interpreter, with PYTHONPATH as it needs it. MODEL: a model's directory for
# mismatch. TINY=1: sizes that a CPU can do.
set -u
refuse() { echo "run_all.sh: $1" >&2; exit 2; }
[ -n "${1:-}" ] || refuse "no folder for the results: PYTHON=python3 bash benchmarks/gpu/run_all.sh OUT [NAME ...]"
out=$1
shift
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
all="logprobs weight_stream step_shares train_step generation mismatch efficiency"
names=${*:-$all}
for name in $names; do
  case " $all " in *" $name "*) ;; *) refuse "there is no benchmark $name: use some of $all" ;; esac
done
command -v "$python" >/dev/null || refuse "there is no $python: set PYTHON"
[ -z "${MODEL:-}" ] || [ -f "$MODEL/config.json" ] || refuse "no config.json in $MODEL: set MODEL to the directory of a Hugging Face model"
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || refuse "$out cannot be written to"
failed=

run() {  # name, seconds, arguments
  local name=$1 seconds=$2
  shift 2
  case " $names " in *" $name "*) ;; *) return ;; esac
  [ -n "${TINY:-}" ] && set -- "$@" --tiny && seconds=1200
  echo "== $name, at most $seconds s"
  timeout --signal=TERM --kill-after=5 $((seconds + 15)) \
    "$python" "$here/$name.py" --json "$out/$name.json" --seconds "$seconds" "$@" || { echo "== $name FAILED with $?"; failed="$failed $name"; }
}

run logprobs 40
run weight_stream 80 --repeats 3
run step_shares 85 --prompts 16 --answer 256 --steps 3
run train_step 135 --profile "$out/profiles"
run generation 90 --repeats 1
run mismatch 110 ${MODEL:+"$MODEL"}
run efficiency 45

echo
"$python" "$here/results.py" "$out" --ratios
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
