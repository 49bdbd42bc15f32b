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
if [ -n "$quick" ]; then # the quickstart's twelve kinds of constraints, and fewer prompts for what is slow
  cp "$here/../quickstart/"*.jsonl .
  head -n 100 "$here/../quickstart/self-prompts.jsonl" >self-prompts.jsonl
  head -n 200 "$here/../quickstart/heldout.jsonl" >heldout.jsonl
else # all 27
  python "$here/../quickstart/make_prompts.py" . --study
fi

# An array each for what several lines share. A second seed is another folder: SEED=7 bash run.sh FOLDER.
seed=(--seed "${SEED:-42}")
critic=(--critic python:critic.py:critique --max-new-tokens 32 "${seed[@]}")
trained=(--global-batch 8 --micro-batch 8 --samples 0 --critic-check 0 "${seed[@]}")
whole=(--loss-on feedback,refinement --refinement-feedback --epochs 1 --learning-rate 3e-4 "${trained[@]}")
check=(--check python:critic.py:check --max-new-tokens 32 "${seed[@]}")
checklist=(--score checklist --critic-max-tokens 100)
anyhow=(--min-coverage 0.5) # replies that cannot be read are counted in the tables, and end nothing
own=(--prompts self-prompts.jsonl --samples 4 --temperature 1 "${checklist[@]}" "${check[@]}")
preferred=(--learning-rate 3e-5 --beta 0.1 --global-batch 8 --micro-batch 8 --epochs 1 --samples 0 "${seed[@]}")
# A critic that tells nothing apart leaves no pair (exit 3), and its arm is left out. What else fails ends all.
attempt() { "$@" || [ $? -eq 3 ]; }
looked=200 # held-out prompts of the slow comparisons, 5 and 6
if [ -n "$quick" ]; then looked=60; fi

# 1. What language feedback is worth: against the refinements alone, for as many tokens read; without
#    contrast; without a part of it.
srt collect-feedback --model "$base" "${critic[@]}" --contrast python:critic.py:contrast
srt sft --out models/stage-1 "${whole[@]}"
srt sft --out models/refinement-only --refinement-only --epochs 7 --learning-rate 3e-4 "${trained[@]}"
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
srt sft --data own-feedback.jsonl --model models/refinement-only --out models/refinement-only-2 --refinement-only --epochs 5 --learning-rate 2e-4 "${trained[@]}" # its control

# 3. Stage 2: pairs by the model's own scores, after each round and by strategy.
rounds=(stage-1 round-2)
if [ -n "$quick" ]; then rounds=(round-2); fi
for model in "${rounds[@]}"; do
  srt self-critique --model "models/$model" "${own[@]}" --out "$model-self.jsonl"
  attempt srt build-prefs --data "$model-self.jsonl" --strategy best-worst --score expected --out "$model-prefs.jsonl"
  if [ -e "$model-prefs.jsonl" ]; then
    srt dpo --prefs "$model-prefs.jsonl" --out "models/$model-dpo" "${preferred[@]}"
  fi
done
# Its control: stage 1 continued on as many refinements.
srt sft --data own-feedback.jsonl --limit "$(wc -l < round-2-prefs.jsonl)" --refinement-only --model models/round-2 --out models/round-2-continued --epochs 1 --learning-rate 3e-5 "${trained[@]}"
if [ -z "$quick" ]; then
  # The paper's pairs, a refinement against its draft; and the best answer against the base's.
  attempt srt build-prefs --data round-2-self.jsonl --strategy refine --score expected --out refine-prefs.jsonl
  srt eval --prompts self-prompts.jsonl --model "$base" "${check[@]}" --out first.json
  srt build-prefs --data round-2-self.jsonl --strategy best-worst --score expected --rejected first.outputs.jsonl --out first-rejected-prefs.jsonl
  for pairs in refine first-rejected; do
    if [ -e "$pairs-prefs.jsonl" ]; then
      srt dpo --prefs "$pairs-prefs.jsonl" --out "models/$pairs" "${preferred[@]}"
    fi
  done
  # How often the labels are right by each kind of score, of a model that was also taught to compare.
  srt sft --data own-feedback.jsonl --model models/stage-1 --out models/round-2-compare --compare "${whole[@]}" --learning-rate 2e-4
  srt self-critique --model models/round-2-compare --compare "${own[@]}" --limit 120 --out compared-self.jsonl
  for score in integer expected compared; do
    attempt srt build-prefs --data compared-self.jsonl --strategy best-worst --score "$score" --out "by-$score-prefs.jsonl"
  done
fi

# 4. When can self-evaluation be trusted? Critics of known accuracy score the same drafts.
planted=(right-25 right-50 right-75 right-90 right-100)
if [ -n "$quick" ]; then planted=(right-50 right-100); fi
for name in "${planted[@]}"; do
  cp -n round-2-self.journal.jsonl "$name.journal.jsonl"
  srt self-critique --model models/round-2 "${own[@]}" --critic "python:planted.py:${name/-/_}" --critic-for everything --out "$name.jsonl"
  srt build-prefs --data "$name.jsonl" --strategy best-worst --out "$name-prefs.jsonl"
  srt dpo --prefs "$name-prefs.jsonl" --out "models/$name" "${preferred[@]}"
done
if [ -z "$quick" ]; then # and fewer pairs
  for name in right-50 right-100; do
    srt build-prefs --data "$name.jsonl" --limit 240 --strategy best-worst --out "$name-few-prefs.jsonl"
    srt dpo --prefs "$name-few-prefs.jsonl" --out "models/$name-few" "${preferred[@]}"
  done
fi

# 5. The critic before and after stage 2: on pairs whose better answer the check knows, on its own drafts, and
#    stage by stage, where the last stage is ill: it was taught that every draft of its own is good.
srt collect-feedback --prompts more-prompts.jsonl --limit 128 --model models/round-2 --temperature 1 --critic python:planted.py:praise --max-new-tokens 32 "${seed[@]}" --out praise.jsonl
srt sft --data praise.jsonl --model models/round-2-dpo --out ill/flattered "${whole[@]}"
srt eval --pairs right-100-prefs.jsonl --model models/stage-1 --model models/round-2 --model models/round-2-dpo "${checklist[@]}" "${anyhow[@]}" --out agreement.json
if [ -z "$quick" ]; then
  srt self-critique --model models/round-2-dpo "${own[@]}" --samples 1 --out round-2-dpo-self.jsonl
fi
srt eval --prompts heldout.jsonl --limit "$looked" --reference models/stage-1 --model models/round-2 --model models/round-2-dpo --model ill/flattered --scorer python:critic.py:critique "${checklist[@]}" "${check[@]}" "${anyhow[@]}" --out drift.json

# 6. Refining an answer, against choosing the best of four.
srt self-critique --model models/round-2 "${own[@]}" --prompts heldout.jsonl --limit "$looked" --temperature 0.7 --out best-of.jsonl
srt eval --prompts heldout.jsonl --limit "$looked" --model models/round-2 "${check[@]}" "${checklist[@]}" "${anyhow[@]}" --use response --use refinement --rounds 3 --out refining.json

# 7. All of them on prompts whose topics appear nowhere in training; the judge is for the length control.
models=(models/*)
srt eval --prompts heldout.jsonl --reference "$base" "${models[@]/#/--model=}" --judge python:critic.py:judge "${check[@]}" "${anyhow[@]}"
python "$here/page.py" .
echo "$PWD/study.html"
