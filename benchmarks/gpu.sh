#!/bin/sh
# What is measured on a GPU, in under ten minutes each; JSON lines into FILE (default: gpu-NAME.jsonl).
#
#   benchmarks/gpu.sh retrain [FILE]      a 7B-shaped model at 26 blocks: LoRA and CPT, tokens/s, memory, share of peak
#   benchmarks/gpu.sh score [FILE]        a 7B-shaped model scored: seconds, tokens/s, memory, share of peak, the other ways
#   benchmarks/gpu.sh serve [FILE]        a 7B-shaped model, dense and cut: latency, memory, utilisation, batch 1 to 256; PART=eager,
#                                         compiled or draft alone; FOLDER=DIR keeps the checkpoints, and a run resumes
#
# PYTHON is a Python in which shortstack[retrain] is installed; SMALL=1 tries the script out on any machine.
set -eu
name=${1:-}
file=${2:-gpu-$name.jsonl}
python=${PYTHON:-python}
small=${SMALL:-}
here=$PWD
cd "$(dirname "$0")"
case $name in
retrain) size=--seven; [ -z "$small" ] || size="--steps 6"; "$python" -W ignore retraining.py $size | tee "$here/$file" ;;
score) "$python" -W ignore gpu_scoring.py ${small:+--small} | tee "$here/$file" ;;
serve)
  "$python" -W ignore gpu_serving.py ${small:+--small} ${PART:+--part "$PART"} ${FOLDER:+--folder "$FOLDER"} | tee "$here/$file"
  ;;
*) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
