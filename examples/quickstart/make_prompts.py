"""Make the quickstart's three prompt files: `python make_prompts.py` in this folder.

Each prompt asks for one sentence about a topic under one or two constraints. The files share no
topic, so that held-out prompts are new in what they ask, not only in how.
"""

import json
import random
from pathlib import Path

from critic import KINDS

SEED = 7
# File -> its number of topics and of rows.
FILES = {"prompts.jsonl": (100, 100), "self-prompts.jsonl": (80, 80), "heldout.jsonl": (72, 72)}

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

ARGUMENTS = {
    "without": ["the", "and", "is", "of"],
    "at_most": ["8", "10", "12"],
    "include": ["silver", "morning", "quiet", "bright", "simple", "golden", "gentle", "distant"],
    "start": ["Today", "Perhaps", "Certainly", "Sometimes", "Clearly", "Often"],
    "end": ["in the end", "every day", "after all", "as always", "for everyone"],
}
# How often each kind stands alone.
WEIGHTS = {
    "without": 1, "no_commas": 2, "at_most": 1, "include": 2, "start": 4, "end": 3,
    "two_sentences": 1, "lower": 3, "upper": 1, "bullet": 3, "quoted": 3, "json": 3,
}  # fmt: skip
PAIRS = [("start", "quoted"), ("end", "quoted"), ("start", "end"), ("include", "lower")]
SHARE_OF_PAIRS = 0.1


def make_row(number: int, topic: str, draw: random.Random) -> dict[str, object]:
    """One prompt row with its constraints in words and as data."""
    if draw.random() < SHARE_OF_PAIRS:
        kinds = list(draw.choice(PAIRS))
    else:
        kinds = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
    constraints = [[kind, draw.choice(ARGUMENTS.get(kind, [""]))] for kind in kinds]
    asked = " ".join(KINDS[kind].ask.format(argument) for kind, argument in constraints)
    start = "Write about" if "two_sentences" in kinds else "Write one sentence about"
    return {
        "id": f"{topic.replace(' ', '-')}-{number}",
        "prompt": f"{start} {topic}. {asked}",
        "constraints": constraints,
    }


def main() -> None:
    """Write the three files beside this program; the same seed writes the same bytes."""
    draw = random.Random(SEED)
    topics = list(dict.fromkeys(TOPICS))
    draw.shuffle(topics)
    for name, (count, row_count) in FILES.items():
        mine, topics = topics[:count], topics[count:]
        assert len(mine) == count, f"{name}: too few topics"
        rows = [make_row(number, mine[number % count], draw) for number in range(row_count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
