#!/usr/bin/env bash
# The whole method on a small real model, on a CPU and without any key: bash run.sh [FOLDER]
# The critic is a program (critic.py), so everything that it and the model say can be checked.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-work}
base=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
mkdir -p "$folder"
cd "$folder"
started=$SECONDS

critic=(--critic "python:$here/critic.py:critique" --max-new-tokens 32)
trained=(--learning-rate 3e-4 --global-batch 8 --micro-batch 8 --samples 0)

# Stage 1: the base's drafts, a critic's feedback, refinements, and refinements with one fault planted.
srt collect-feedback --prompts "$here/prompts.jsonl" --model "$base" "${critic[@]}" --contrast "python:$here/critic.py:contrast"
srt sft --loss-on feedback,refinement --refinement-feedback --verdict-weight 6 --epochs 1 "${trained[@]}"
# Its control: the same refinements without any feedback, twice over.
srt sft --out models/control --refinement-only --epochs 2 "${trained[@]}"
# A second round on the tuned model's own drafts, whose mistakes it will have to see in stage 2.
srt collect-feedback --prompts "$here/more-prompts.jsonl" --model models/sft --temperature 1 "${critic[@]}" --out own-feedback.jsonl
srt sft --data own-feedback.jsonl --model models/sft --out models/sft-2 --loss-on feedback,refinement --refinement-feedback --verdict-weight 6 --epochs 1 "${trained[@]}" --learning-rate 2e-4
# Stage 2: four drafts a prompt, scored by the model's own checklists; the check only looks on.
srt self-critique --prompts "$here/self-prompts.jsonl" --model models/sft-2 --samples 4 --temperature 1 --score checklist --check "python:$here/critic.py:check" --max-new-tokens 32 --critic-max-tokens 100
srt build-prefs --strategy best-worst --score expected
srt dpo --learning-rate 3e-5 --beta 0.1 --global-batch 8 --micro-batch 8 --epochs 1
srt eval --prompts "$here/heldout.jsonl" --reference "$base" --model models/control --model models/sft --model models/sft-2 --model models/dpo --check "python:$here/critic.py:check" --max-new-tokens 32

echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s, in $PWD"
