"""What expected scores are worth beside integer ones, on the quickstart, whose truth is planted.

`python bench/expected_score.py build/quickstart` reads what `make demo` left there: the tuned model's
scores of its own drafts and refinements. The truth is the share of the prompt's constraints that an
answer meets, as the quickstart's checker counts them.
"""

import importlib.util
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
from scipy import stats

from srt_cli.records import FeedbackRecord, Prompt

QUICKSTART: Final = Path(__file__).parents[1] / "examples" / "quickstart"


def rank_correlation(scores: list[float], truths: list[float]) -> str:
    """Spearman's, with a percentile interval over answers."""
    pairs = np.array([scores, truths])
    random = np.random.default_rng(0)
    draws = [
        stats.spearmanr(*pairs[:, random.integers(0, len(scores), len(scores))]).statistic
        for _ in range(2000)
    ]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return f"{stats.spearmanr(*pairs).statistic:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    spec = importlib.util.spec_from_file_location("critic", QUICKSTART / "critic.py")
    assert spec is not None
    assert spec.loader is not None
    critic = importlib.util.module_from_spec(spec)
    sys.modules["critic"] = critic
    spec.loader.exec_module(critic)
    prompts = {}
    for line in (QUICKSTART / "self-prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompts[row["id"]] = Prompt.model_validate(row)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/quickstart")
    integers, expected, truths, gains = [], [], [], []
    for line in (folder / "self-feedback.jsonl").read_text().splitlines():
        record = FeedbackRecord.model_validate_json(line)
        feedback = record.feedback
        if feedback is None or feedback.score_mean is None:
            continue
        scored = [(record.response, feedback.score, feedback.score_mean)]
        if record.refinement_score is not None and record.refinement_score_mean is not None:
            scored.append(
                (record.refinement, record.refinement_score, record.refinement_score_mean)
            )
            if record.refinement != record.response:
                gains.append((record.gain, scored[1][2] - scored[0][2]))
        prompt = prompts[record.id]
        for text, integer, mean in scored:
            broken = len(critic.broken_constraints(prompt, text or ""))
            truths.append(1 - broken / len(critic.constraints_of(prompt)))
            integers.append(float(integer))
            expected.append(mean)
    print(f"{len(truths)} answers, {len(gains)} drafts with a refinement that is no copy")
    for name, scores, place in (("integer", integers, 0), ("expected", expected, 1)):
        pairs = list(combinations(scores, 2))
        tied = sum(a == b for a, b in pairs) / len(pairs)
        even = sum(gain[place] == 0 for gain in gains)
        shown = rank_correlation(scores, truths)
        print(
            f"{name}: {tied:.1%} of all pairs of answers tied; {even} refinements tied with their "
            f"draft; Spearman with the truth {shown}"
        )


if __name__ == "__main__":
    main()
