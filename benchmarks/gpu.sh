#!/bin/sh
# What is measured on a GPU, in under ten minutes each; JSON lines into FILE (default: gpu-NAME.jsonl).
#
#   benchmarks/gpu.sh retrain [FILE]      a 7B-shaped model at 26 blocks: LoRA and CPT, tokens/s, memory, share of peak
#
# PYTHON is a Python in which shortstack[retrain] is installed; SMALL=1 tries the script out on any machine.
set -eu
name=${1:-}
file=${2:-gpu-$name.jsonl}
python=${PYTHON:-python}
size=--seven
[ -z "${SMALL:-}" ] || size="--steps 6"
here=$PWD
cd "$(dirname "$0")"
case $name in
retrain) "$python" -W ignore retraining.py $size | tee "$here/$file" ;;
*) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
