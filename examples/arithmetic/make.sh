#!/usr/bin/env bash
# Makes the demo's data and model from nothing, as they are shipped: some 15 minutes on two cores.
# usage: [PYTHON=.venv/bin/python] examples/arithmetic/make.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=runs/arithmetic
sft="$python -m megatron_nft sft examples/arithmetic/sft.yaml"

"$python" examples/arithmetic/make_model.py "$work/random"
"$python" examples/arithmetic/make_data.py "$work/data"
# until it can work in steps: the second command goes on where the first one ended, with a lower learning rate
$sft
$sft sft.steps=1200 optimizer.lr=5e-4
# until it often does not care to
$sft "run_dir=$work/mixed" "model.path=$work/worked/huggingface" "sft.data.0.path=$work/data/mixed.jsonl" sft.steps=140 optimizer.lr=3e-4
cp "$work/data/prompts.jsonl" "$work/data/heldout.jsonl" examples/arithmetic/
rm -rf examples/arithmetic/model
cp -r "$work/mixed/huggingface" examples/arithmetic/model
