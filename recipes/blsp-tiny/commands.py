"""Spoken commands for a house: Home Assistant's sentence templates, filled in at random.

In: the templates of the package `home-assistant-intents`, parsed by `hassil`. Out: (intent, template,
command).
Where in the flow: run once by `build_texts.py`, whose lists are committed; not needed to use them.

Try: `python recipes/blsp-tiny/build_texts.py --help`
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from packages import download_wheel
from spoken_numbers import number_words

INTENTS = ("home-assistant-intents==2026.10.27", "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40")
AREAS = (
    "kitchen, living room, bedroom, bathroom, garage, office, basement, hallway, dining room, garden, attic, nursery"
)
FLOORS = "first, second, ground, top, upper, lower"
NAMES = {  # what stands for {name}, by the domain that the template asks for
    "light": "desk lamp, ceiling light, reading lamp, porch light, night light, floor lamp",
    "fan": "ceiling fan, tower fan, bathroom fan",
    "lock": "front door, back door, side gate",
    "cover": "left curtain, garage door, kitchen blinds, window shutter",
    "vacuum": "robot vacuum, vacuum cleaner, Rosie",
    "lawn_mower": "lawn mower, robot mower",
    "media_player": "television, stereo, kitchen speaker, radio",
    "weather": "London, New York, Berlin, my home town",
    "todo": "shopping, packing, cleaning, homework, birthday",
    "climate": "thermostat, heater, air conditioner",
    "": "coffee machine, heater, printer, kettle, aquarium pump, Christmas tree, doorbell, sprinkler",
}
WILDCARDS = {
    "message": "dinner is ready, it is time to go, the bus is here, I will be late tonight",
    "search_query": "some jazz, my favorite songs, the news, classical music, Yesterday, the latest album",
    "timer_name": "pizza, laundry, egg, pasta, homework, tea",
    "timer_command": "turn off the lights, open the garage door, lock the front door, start the vacuum",
    "shopping_list_item": "milk, two loaves of bread, olive oil, a dozen eggs, dish soap, bananas, rice",
    "todo_list_item": "call the dentist, water the plants, pay the rent, feed the cat, buy stamps, socks",
    "zone": "work, school, the gym",
}


@dataclass(frozen=True)
class Command:
    intent: str
    template: str
    text: str


def commands(root: Path, each: int) -> Iterator[Command]:
    """Up to `each` different commands of every English template."""
    with zipfile.ZipFile(download_wheel(*INTENTS, root)) as wheel:
        english = json.loads(wheel.read("home_assistant_intents/data/en.json"))
    for intent, blocks in english["intents"].items():
        for block in blocks["data"]:
            for template in block.get("sentences", []):
                texts = (_fill(template, english, block, Random(f"{template} {k}")) for k in range(3 * each))
                for text in list(dict.fromkeys(texts))[:each]:
                    yield Command(intent, template, text)


def _fill(template: str, english: dict[str, Any], block: dict[str, Any], random: Random) -> str:
    from hassil import parse_sentence

    text = _say(parse_sentence(template).expression, english, block, random)
    return re.sub(r"\s+", " ", text).replace("°", " degrees").replace("%", " percent").replace("  ", " ").strip()


def _say(node: Any, english: dict[str, Any], block: dict[str, Any], random: Random) -> str:
    """One random way through the template below `node`."""
    from hassil import parse_sentence
    from hassil.expression import Alternative, ListReference, Permutation, RuleReference, TextChunk

    if isinstance(node, TextChunk):
        return node.original_text
    if isinstance(node, RuleReference):
        rules = english["expansion_rules"] | block.get("expansion_rules", {})
        return _say(parse_sentence(rules[node.rule_name]).expression, english, block, random)
    if isinstance(node, ListReference):
        return _slot(node.list_name, english, block, random)
    if isinstance(node, Alternative):
        return _say(random.choice(node.items), english, block, random)
    parts = [_say(item, english, block, random) for item in node.items]
    if isinstance(node, Permutation):
        random.shuffle(parts)
        return " ".join(part.strip() for part in parts)
    return "".join(parts)


def _slot(name: str, english: dict[str, Any], block: dict[str, Any], random: Random) -> str:
    from hassil import parse_sentence

    if name == "area":
        return random.choice(AREAS.split(", "))
    if name == "floor":
        return random.choice(FLOORS.split(", "))
    if name == "name":
        domain = block.get("requires_context", {}).get("domain", "")
        domain = domain[0] if isinstance(domain, list) else domain
        return random.choice(NAMES.get(domain if isinstance(domain, str) else "", NAMES[""]).split(", "))
    if name in WILDCARDS:
        return random.choice(WILDCARDS[name].split(", "))
    values = (block.get("lists", {}) | english["lists"])[name]
    if "range" in values:
        low, high = int(values["range"]["from"]), int(values["range"]["to"])
        return number_words(random.randrange(max(low, 1), high + 1, values["range"].get("step", 1)))
    value = random.choice(values["values"])
    return _say(parse_sentence(value if isinstance(value, str) else value["in"]).expression, english, block, random)
