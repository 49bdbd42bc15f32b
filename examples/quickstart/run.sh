#!/usr/bin/env bash
# The whole method on a small real model, on a CPU and without any key: bash run.sh [FOLDER]
# The critic is a program (critic.py), so everything it says can be checked.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-work}
base=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
mkdir -p "$folder"
cd "$folder"
started=$SECONDS

srt collect-feedback --prompts "$here/prompts.jsonl" --model "$base" --critic "python:$here/critic.py:critique" --max-new-tokens 28
srt sft --epochs 2 --learning-rate 2e-4 --global-batch 4 --loss-on feedback,refinement --refinement-feedback
srt self-critique --prompts "$here/self-prompts.jsonl" --check "python:$here/critic.py:check" --max-new-tokens 28 --critic-max-tokens 110 --samples 4
srt build-prefs --strategy best-worst
srt dpo --learning-rate 1e-5 --beta 0.1 --global-batch 8 --epochs 4 --warmup 0
srt eval --prompts "$here/heldout.jsonl" --model models/sft --model models/dpo --judge "python:$here/critic.py:judge" --check "python:$here/critic.py:check" --use response --use refinement --max-new-tokens 28 --critic-max-tokens 110

echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s, in $PWD"
