"""Critics that are right as often as planned (`python:planted.py:right_75`, 75 in 100), and a flatterer.

Whether an answer is judged rightly depends on its words alone, so every run gives the same scores.
"""

import random
from collections.abc import Callable
from functools import partial

from critic import check, checklist

from srt_cli.records import Feedback, Prompt


def score(accuracy: int, prompt: Prompt, response: str) -> tuple[Feedback, str]:
    """9 for an answer that is called good, 3 for one that is called bad."""
    right = random.Random(f"{prompt.id} {response}").random() < accuracy / 100
    called_good = check(prompt, response) == right
    feedback = Feedback(weaknesses="-", suggestions="-", score=9 if called_good else 3)
    return feedback, response


def praise(prompt: Prompt, response: str) -> tuple[Feedback, str]:
    """A checklist as `critic.critique` writes it that finds every constraint met, in any answer."""
    text = response.strip()
    weaknesses = checklist(prompt, text, broken=[])
    return Feedback(weaknesses=weaknesses, suggestions="Keep it.", score=10), text


def __getattr__(name: str) -> Callable[[Prompt, str], tuple[Feedback, str]]:
    accuracy = name.removeprefix("right_")
    if not accuracy.isdecimal():
        raise AttributeError(name)
    return partial(score, int(accuracy))
