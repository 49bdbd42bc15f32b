#!/usr/bin/env bash
# The largest ocean, step by step: bash run.sh [FOLDER]. docs/ocean.md shows what each line leaves.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
mkdir -p "${1:-ocean}"
cd "${1:-ocean}"
cp "$here"/{critic.py,prompts.jsonl,heldout.jsonl} .

srt collect-feedback --model "$base" --critic python:critic.py:critique --temperature 0 --max-new-tokens 48
srt sft --dry-run --show-masks 1 --loss-on feedback,refinement --refinement-feedback --epochs 2 > plan.txt
srt sft --loss-on feedback,refinement --refinement-feedback --epochs 2 --learning-rate 2e-4 --global-batch 4 --samples 0 --critic-check 0
srt self-critique --prompts heldout.jsonl --check python:critic.py:check --temperature 0 --max-new-tokens 48 --critic-max-tokens 120
# The tuned model on the base's first draft: a row that brings its response is criticised as it is.
srt self-critique --prompts feedback.jsonl --limit 1 --critic-max-tokens 120 --out again.jsonl
