"""A critic that knows one thing: which ocean is the largest, and what share of the water it covers.

    --critic python:critic.py:critique
    --check  python:critic.py:check

The figure is NOAA's ("Volumes of the World's Oceans from ETOPO1", 2010): with its seas, the Pacific
covers 168.7 of the 361.9 million square kilometres of all oceans, 46.6 %. Of the Earth's whole surface,
land included, it covers 33.1 %.
"""

import re

from srt_cli.records import Feedback, Prompt

OCEANS = ("Pacific", "Atlantic", "Indian", "Southern", "Arctic")
SHARE = re.compile(r"(\d+(?:\.\d+)?)(?: ?%| percent\b)")
OF_WATER = re.compile(r"% of (?:(?:the|all|total|Earth's|world's) )*(?:water|oceans?)\b")
ANSWER = (
    "The largest ocean on Earth is the Pacific Ocean, covering 46.6% of the Earth's water surface."
)


def named_in(text: str) -> str | None:
    """The first ocean that a text names."""
    return min((name for name in OCEANS if name in text), key=text.index, default=None)


def is_right(text: str) -> bool:
    """Whether every share in a text is the right one, of the right whole, and there is one."""
    shares = [float(share) for share in SHARE.findall(text)]
    return bool(shares and OF_WATER.search(text)) and all(46 <= share <= 47 for share in shares)


def check(prompt: Prompt, response: str) -> bool:
    """Whether a response names the Pacific first, with its share of the water surface."""
    return named_in(response) == "Pacific" and is_right(response)


def critique(prompt: Prompt, response: str) -> tuple[Feedback, str]:
    """What a response says, whether that is right, and the response mended in its own words."""
    ocean, share = named_in(response), SHARE.search(response)
    said = f"the {ocean} Ocean" if ocean else "no ocean"
    findings = [f"It names {said}: {'yes' if ocean == 'Pacific' else 'no'}."]
    words = (
        share[0] + re.split(r"[,.]\s|[,.]$", response[share.end() :])[0] if share else "no share"
    )
    findings.append(f"It says {words}: {'yes' if is_right(response) else 'no'}.")
    if check(prompt, response):
        return Feedback(weaknesses=" ".join(findings), suggestions="Keep it.", score=10), response
    advice = [] if ocean == "Pacific" else ["Name the Pacific Ocean."]
    if not is_right(response):
        advice.append("The Pacific covers 46.6% of the Earth's water surface.")
    mended = SHARE.sub("46.6%", response).replace("approximately ", "")
    feedback = Feedback(
        weaknesses=" ".join(findings),
        suggestions=" ".join(advice),
        score=2 + 3 * (ocean == "Pacific") + 3 * is_right(response),
    )
    return feedback, mended if check(prompt, mended) else ANSWER
