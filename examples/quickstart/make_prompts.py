"""Make the prompt files: `python make_prompts.py FOLDER [--study]`.

Each prompt asks for a sentence about a topic under one or two constraints: of twelve kinds that have a
place in the answer (its first word, its last words, its frame), or, for the study, of all 27. The files
share no topic, so that held-out prompts are new in what they ask, not only in how.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from critic import KINDS

SEED = 7
TOPICS_EACH = 65
PLACED = (
    "start", "label", "end", "exclaim", "dots", "sign", "lower", "bullet", "heading", "quoted", "parens",
    "bold",
)  # fmt: skip


class Rows(NamedTuple):
    """How many rows a file has: of the kinds that have a place, and in the study of all kinds."""

    quickstart: int
    study: int


FILES = {
    "prompts.jsonl": Rows(144, 240),
    "more-prompts.jsonl": Rows(208, 256),
    "self-prompts.jsonl": Rows(160, 240),
    "heldout.jsonl": Rows(300, 300),
}
WORDS = (
    "without", "no_commas", "at_most", "two_sentences", "include", "number", "semicolon", "start", "end",
    "label", "question", "exclaim", "dots", "sign", "postscript", "hashtag",
)  # fmt: skip
"""What the words must be; all other kinds are about form. A second constraint is of the other sort."""
SHARE_OF_PAIRS = 0.4

TOPICS = """
apples|rain|trains|the sea|old books|winter|bread|bicycles|cats|the moon|tea|bridges|gardens|music|
maps|honey|stars|rivers|clocks|kites|owls|salt|forests|letters|lamps|mountains|soup|wind|horses|ice|
paint|shoes|chess|coffee|islands|cameras|wool|pianos|deserts|bees|castles|milk|ladders|snow|radios|
rice|whales|fire|glass|pens|dogs|tomatoes|planes|summer|libraries|mirrors|oranges|sand|towers|violins|
wolves|paper|cheese|harbors|drums|eggs|frogs|gold|hats|ink|jackets|keys|leaves|mice|nests|onions|
pepper|quilts|roses|ships|tents|umbrellas|valleys|windows|yarn|zebras|autumn|boats|candles|dreams|
echoes|farms|gloves|hills|insects|jars|kitchens|lemons|markets|needles|oceans|pears|queens|roads|
spoons|tigers|uncles|villages|walls|yogurt|ants|beans|clouds|ducks|engines|fences|goats|hammers|
ivy|jam|knots|lakes|museums|nuts|owners|pigs|rabbits|schools|trees|vases|wheels|yards|anchors|
buttons|carrots|doors|eagles|feathers|games|hotels|ideas|jokes|kings|lions|melons|nurses|orchards|
parks|quarries|robots|sheep|tables|uniforms|volcanoes|wagons|artists|balloons|camels|dolls|elephants|
flutes|guitars|houses|inns|jewels|knives|lawns|magnets|notebooks|olives|pumpkins|radishes|seeds|
toys|vines|waterfalls|actors|barns|cousins|dancers|elbows|flags|grapes|hens|igloos|judges|kettles|
lobsters|meadows|noodles|otters|poems|puddles|ropes|sailors|teachers|turtles|valets|weavers|
acorns|bakers|cellars|dates|envelopes|figs|geese|hedges|instruments|journals|kiosks|ledgers|mills|
napkins|opals|pilots|quails|rockets|statues|tunnels|urns|violets|wells|apricots|barrels|chairs|
dolphins|elms|foxes|galaxies|hawks|icicles|jungles|kangaroos|lanterns|mushrooms|neighbors|oaks|
parrots|rugs|squirrels|tulips|villas|walnuts|almonds|bells|caves|doves|easels|fountains|glaciers|
hives|irises|jackals|kelp|larks|marbles|nectarines|orchids|puppets|reefs|swans|thistles|varnish
""".replace("\n", "").split("|")


def fit_together(names: list[str]) -> bool:
    """Whether an answer can meet both: mending one leaves the other whole."""
    kinds = [(kind, kind.arguments[0]) for name, kind in KINDS.items() if name in names]
    for text in ("The thing is old.", "Bread, a food of many people, is made from flour."):
        for kind, argument in kinds:
            text = text if kind.check(text, argument) else kind.mend(text, argument)
        if not all(kind.check(text, argument) for kind, argument in kinds):
            return False
    return True


def draw_constraints(name: str, kinds: Sequence[str], draw: random.Random) -> list[list[str]]:
    """One or two constraints that can be met together, in the order of mending."""
    names = [name]
    fitting = [
        other
        for other in kinds
        if (other in WORDS) != (name in WORDS) and fit_together([name, other])
    ]
    if fitting and draw.random() < SHARE_OF_PAIRS:
        names.append(draw.choice(fitting))
    return [[kind, draw.choice(KINDS[kind].arguments)] for kind in KINDS if kind in names]


def make_row(number: int, topic: str, constraints: list[list[str]]) -> dict[str, object]:
    """One prompt row with its constraints in words and as data."""
    asked = " ".join(KINDS[kind].ask.format(argument) for kind, argument in constraints)
    several = any(kind in ("two_sentences", "postscript") for kind, _ in constraints)
    return {
        "id": f"{topic.replace(' ', '-')}-{number}",
        "prompt": f"Write {'' if several else 'one short sentence '}about {topic}. {asked}",
        "constraints": constraints,
    }


def main(folder: Path, study: bool) -> None:
    """Write the files; each has a draw of its own, so that one can grow without the others."""
    topics = list(dict.fromkeys(TOPICS))
    random.Random(SEED).shuffle(topics)
    kinds = tuple(KINDS) if study else PLACED
    for name, counts in FILES.items():
        mine, topics = topics[:TOPICS_EACH], topics[TOPICS_EACH:]
        draw = random.Random(f"{SEED} {name}")
        rows, left = [], list[str]()
        for number in range(counts.study if study else counts.quickstart):
            if not left:
                left = list(kinds)
                draw.shuffle(left)
            constraints = draw_constraints(left.pop(), kinds, draw)
            rows.append(make_row(number, mine[number % len(mine)], constraints))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--study" in sys.argv)
