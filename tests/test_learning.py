"""A real model learns every part of a row: draft, feedback and refinement; and where each ends."""

import pytest
from conftest import ROOT, read_jsonl, write_jsonl

QUICKSTART = ROOT / "examples" / "quickstart"
CRITIC = f"python:{QUICKSTART / 'critic.py'}"
# The drafts are another writer's: those of the model itself hold nothing that it does not know.
WRITER = '''
import zlib

ENDINGS = ("is found in many places", "is older than most people think", "takes time to know well")

def write(prompt):
    """What the prompt asks about, in one plain sentence, whatever its constraint is."""
    topic = prompt.prompt.split(" about ")[1].split(".")[0].split(",")[0]
    ending = ENDINGS[zlib.crc32(topic.encode()) % len(ENDINGS)]
    return f"The subject of {topic} {ending}."
'''


@pytest.mark.smollm2
def test_the_loss_of_every_part_falls_on_unseen_rows_and_every_turn_ends(srt, tmp_path, smollm2):
    (tmp_path / "writer.py").write_text(WRITER)
    collected = srt(
        "collect-feedback", "--prompts", QUICKSTART / "prompts.jsonl", "--limit", 64,
        "--model", "python:writer.py:write", "--critic", f"{CRITIC}:critique",
    )  # fmt: skip
    assert collected.code == 0, collected.stderr
    tuned = srt(
        "sft", "--model", smollm2, "--eval-split", 0.2, "--eval-every", 1000, "--epochs", 1,
        "--learning-rate", 2e-4, "--global-batch", 4, "--samples", 0, "--critic-check", 0,
    )  # fmt: skip
    assert tuned.code == 0, tuned.stderr
    before, after = (
        row for row in read_jsonl(tmp_path / "models/sft/metrics.jsonl") if "eval_loss" in row
    )
    for part in ("response", "feedback", "refinement"):
        assert after[f"eval_loss_{part}"] < 0.8 * before[f"eval_loss_{part}"], part

    unseen = read_jsonl(QUICKSTART / "heldout.jsonl")[:6]
    write_jsonl(tmp_path / "unseen.jsonl", unseen)
    criticised = srt(
        "self-critique", "--prompts", "unseen.jsonl", "--max-new-tokens", 60,
        "--critic-max-tokens", 160,
    )  # fmt: skip
    assert criticised.code == 0, criticised.stderr
    # Beside the turns stand probes of a score's second digit, of one token each.
    turns = [
        (reply["call"].split(" ", 1)[1], reply["finish_reason"])
        for reply in read_jsonl(tmp_path / "self-feedback.journal.jsonl")
        if "behind" not in reply["call"]
    ]
    assert {("response", "stop"), ("round 1 critique", "stop")} <= set(turns)
    assert {reason for _, reason in turns} == {"stop"}
