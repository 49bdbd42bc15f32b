"""A critic, judge and check; each call leaves a line in calls.txt, so that a repeated one shows."""

from srt_cli.records import Feedback


def _note(what: str) -> None:
    with open("calls.txt", "a", encoding="utf-8") as calls:
        calls.write(what + "\n")


def critique(prompt, response):
    _note(f"critique {prompt.id}")
    score = 9 if response.endswith("!") else 3 + len(response) % 3
    feedback = Feedback(weaknesses="It is dull.", suggestions="Add spirit.", score=score)
    return feedback, "It is grand!"


def judge(prompt, a, b):
    _note(f"judge {prompt.id}")
    return 0.5 if len(a) == len(b) else float(len(a) < len(b))


def check(prompt, response):
    _note(f"check {prompt.id}")
    return len(response) % 2 == 0
