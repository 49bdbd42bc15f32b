#!/usr/bin/env bash
# Does language feedback improve a small model, and when? bash run.sh FOLDER [--quick]
# Every line can be interrupted: run the same command again, and it goes on. docs/study.md tells what came out.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
quick=${2:-}
mkdir -p "$1"
cd "$1"
cp "$here/../quickstart/critic.py" "$here/planted.py" .
if [ -n "$quick" ]; then # the quickstart's twelve kinds of constraints
  cp "$here/../quickstart/"*.jsonl .
else # all 27
  python "$here/../quickstart/make_prompts.py" . --study
fi

# An array each for what several lines share.
critic=(--critic python:critic.py:critique --max-new-tokens 32)
trained=(--global-batch 8 --micro-batch 8 --samples 0 --critic-check 0)
whole=(--loss-on feedback,refinement --refinement-feedback --epochs 1 --learning-rate 3e-4 "${trained[@]}")
check=(--check python:critic.py:check --max-new-tokens 32)
own=(--prompts self-prompts.jsonl --samples 4 --temperature 1 --score checklist --critic-max-tokens 100 "${check[@]}")
preferred=(--learning-rate 3e-5 --beta 0.1 --global-batch 8 --micro-batch 8 --epochs 1 --samples 0)

# 1. What language feedback is worth: against the refinements alone, for as many trained tokens; without
#    contrast; without a part of it.
srt collect-feedback --model "$base" "${critic[@]}" --contrast python:critic.py:contrast
srt sft --out models/stage-1 "${whole[@]}"
srt sft --out models/refinement-only --refinement-only --epochs 6 --learning-rate 3e-4 "${trained[@]}"
if [ -z "$quick" ]; then
  cp -n feedback.journal.jsonl plain-feedback.journal.jsonl # the same drafts
  srt collect-feedback --model "$base" "${critic[@]}" --out plain-feedback.jsonl
  srt sft --data plain-feedback.jsonl --out models/no-contrast "${whole[@]}"
  for part in weaknesses suggestions score; do
    srt sft --drop "$part" --out "models/without-$part" "${whole[@]}"
  done
fi

# 2. A second round on the tuned model's own drafts, with the same outside critic.
srt collect-feedback --prompts more-prompts.jsonl --model models/stage-1 --temperature 1 "${critic[@]}" --out own-feedback.jsonl
srt sft --data own-feedback.jsonl --model models/stage-1 --out models/round-2 "${whole[@]}" --learning-rate 2e-4
srt sft --data own-feedback.jsonl --model models/refinement-only --out models/refinement-only-2 --refinement-only --epochs 4 --learning-rate 2e-4 "${trained[@]}" # its control

# 3. Stage 2: pairs by the model's own scores, after each round.
for model in stage-1 round-2; do
  srt self-critique --model "models/$model" "${own[@]}" --out "$model-self.jsonl"
  srt build-prefs --data "$model-self.jsonl" --strategy best-worst --score expected --out "$model-prefs.jsonl"
  # A critic that tells nothing apart may leave no pair.
  srt dpo --prefs "$model-prefs.jsonl" --out "models/$model-dpo" "${preferred[@]}" || echo "no stage 2 after $model"
done
# Its control: stage 1 continued on as many refinements.
srt sft --data own-feedback.jsonl --limit "$(wc -l < round-2-prefs.jsonl)" --refinement-only --model models/round-2 --out models/round-2-continued --epochs 1 --learning-rate 3e-5 "${trained[@]}"

# 4. When can self-evaluation be trusted? Critics of known accuracy score the same drafts.
accuracies=(50 60 75 90 100)
if [ -n "$quick" ]; then accuracies=(50 75 100); fi
for accuracy in "${accuracies[@]}"; do
  cp -n round-2-self.journal.jsonl "right-$accuracy.journal.jsonl"
  srt self-critique --model models/round-2 "${own[@]}" --critic "python:planted.py:right_$accuracy" --critic-for everything --out "right-$accuracy.jsonl"
  srt build-prefs --data "right-$accuracy.jsonl" --strategy best-worst --out "right-$accuracy-prefs.jsonl"
  srt dpo --prefs "right-$accuracy-prefs.jsonl" --out "models/right-$accuracy" "${preferred[@]}"
done

# 5. The critic before and after stage 2: on pairs whose better answer the check knows, and on its own drafts.
judges=(--model models/stage-1 --model models/round-2 --model models/round-2-dpo)
srt eval --pairs right-100-prefs.jsonl "${judges[@]}" --score checklist --critic-max-tokens 100 --out agreement.json
srt self-critique --model models/round-2-dpo "${own[@]}" --samples 1 --out after-self.jsonl

# 6. Refining an answer, against choosing the best of four.
srt self-critique --model models/round-2 "${own[@]}" --prompts heldout.jsonl --temperature 0.7 --out best-of.jsonl
srt eval --prompts heldout.jsonl --reference "$base" --model models/round-2 "${check[@]}" --score checklist --critic-max-tokens 100 --use response --use refinement --rounds 3 --out refining.json

# 7. All of them on prompts whose topics appear nowhere in training; the judge is for the length control.
models=(models/*)
srt eval --prompts heldout.jsonl --reference "$base" "${models[@]/#/--model=}" --judge python:critic.py:judge "${check[@]}"
python "$here/page.py" .
echo "$PWD/study.html"
