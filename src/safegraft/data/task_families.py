"""The kinds of question ``make_task`` asks: each draws its values and says how question and answer are worded.

A family returns ``(prompts, answers, key, values)``: templates over ``values``; every answer holds ``{key}``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Family = tuple[tuple[str, ...], tuple[str, ...], str, dict[str, Any]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ana Ben Carla David Elif Farid Grace Hugo Ines Jonas Kofi Lena Marek Nora Omar Petra Quentin Rosa Sven "
    "Tara Uma Viktor Wanda Yara Zoe Aiko Bruno Chloe Dmitri Esther"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
GOODS = _words("mugs lamps pens books candles plates towels cushions baskets vases bowls clocks")
FOODS = _words("pancakes omelettes muffins waffles dumplings flatbreads crepes scones")
SWEETS = _words("cookies grapes cherries marbles stickers nuts plums badges")
PLACES = _words("library station market museum bakery stadium theatre office")
EVENTS = _words("meeting picnic rehearsal dinner lesson match interview concert")
TOPICS = _words("boiler roof garden piano bicycle heating fence laptop")
PLANTS = _words("fern cactus orchid basil ivy rose bonsai palm")
LIGHT = ("in the shade", "in full sun", "near a window", "away from draughts")
DEVICES = {
    "printer": ("press the green button", "close the paper tray", "choose the paper size"),
    "dishwasher": ("fill in the salt", "close the door", "turn the dial to eco"),
    "radio": ("pull out the aerial", "turn the large knob", "press the band switch"),
    "coffee machine": ("fill the water tank", "put in a filter", "press the cup symbol"),
    "scanner": ("lift the lid", "lay the page face down", "press start"),
    "sewing machine": ("lower the foot", "thread the needle", "choose a stitch"),
}
TRIPS = {
    "camping": ("tents", "lamps", "mats"),
    "sailing": ("vests", "ropes", "jackets"),
    "skiing": ("helmets", "goggles", "gloves"),
    "hiking": ("bottles", "maps", "boots"),
}
FRUIT = _words("apple banana cherry fig grape kiwi lemon mango orange peach quince walnut")
WORDS = _words("Green River North Coast Blue Harbour Stone Valley Silver Forest Old Bridge Quiet Meadow")
KINDS = _words("Bank Club Press Choir Museum School Theatre Garden")
SHOPS = _words("flowers bread books shoes cheese toys hats maps")


def recipe(rng: random.Random) -> Family:
    people, each = rng.randint(2, 6), rng.randint(2, 5)
    values = {"food": rng.choice(FOODS), "k": people, "a": each, "total": people * each}
    return (
        (
            "How do I make {food} for {k} people if each person needs {a} eggs?",
            "I want to make {food}. One person needs {a} eggs and we are {k}. What do I need?",
        ),
        (
            "To make {food} for {k} people, take {k} x {a} = {key}.",
            "You will need {k} x {a} = {key} for {k} people.",
        ),
        "{total} eggs",
        values,
    )


def leaving(rng: random.Random) -> Family:
    hour, walk = rng.randint(8, 12), rng.choice((10, 15, 20, 30, 40, 45, 50))
    values = {"place": rng.choice(PLACES), "h": hour, "m": walk, "leave": f"{hour - 1}:{60 - walk}"}
    return (
        (
            "How can I get to the {place} by {h}:00 if the walk takes {m} minutes?",
            "I must be at the {place} at {h}:00 and walk for {m} minutes. When should I leave?",
        ),
        (
            "Leave at {key}. The walk takes {m} minutes, so you reach the {place} by {h}:00.",
            "If you set off at {key}, you will be at the {place} at {h}:00.",
        ),
        "{leave}",
        values,
    )


def sorting(rng: random.Random) -> Family:
    chosen = rng.sample(FRUIT, 3)
    values = {"given": ", ".join(chosen), "sorted": ", ".join(sorted(chosen))}
    return (
        ("Put these in alphabetical order: {given}.", "Sort this list from A to Z: {given}."),
        ("In alphabetical order they are {key}.", "Here is the sorted list: {key}."),
        "{sorted}",
        values,
    )


def paying(rng: random.Random) -> Family:
    number, price = rng.randint(2, 9), rng.randint(2, 6)
    values = {"goods": rng.choice(GOODS), "a": number, "p": price, "total": number * price}
    return (
        ("What do {a} {goods} cost at {p} euros each?", "I buy {a} {goods} for {p} euros each. What do I pay?"),
        ("{a} {goods} at {p} euros each cost {a} x {p} = {key}.", "That makes {a} x {p} = {key} in all."),
        "{total} euros",
        values,
    )


def sharing(rng: random.Random) -> Family:
    friends, each = rng.randint(2, 5), rng.randint(2, 6)
    values = {"things": rng.choice(SWEETS), "k": friends, "n": friends * each, "each": each}
    return (
        (
            "How do I share {n} {things} among {k} friends?",
            "Explain how to split {n} {things} fairly between {k} children.",
        ),
        ("Everyone gets {key}, because {n} / {k} = {each}.", "Divide them: {n} / {k} = {key} each."),
        "{each} {things}",
        values,
    )  # fmt: skip


def later(rng: random.Random) -> Family:
    start, ahead = rng.randrange(7), rng.randint(1, 4)
    values = {"today": DAYS[start], "n": ahead, "then": DAYS[(start + ahead) % 7], "name": rng.choice(NAMES)}
    return (
        ("Today is {today} and {name} comes back in {n} days. Which day is that?",
         "It is {today}. What day do I tell {name} if the parcel needs {n} days?"),
        ("Counting {n} days on from {today} gives {key}.", "That will be {key}, {n} days after {today}."),
        "{then}",
        values,
    )  # fmt: skip


def moving(rng: random.Random) -> Family:
    values = {"name": rng.choice(NAMES), "event": rng.choice(EVENTS), "day": rng.choice(DAYS)}
    return (
        ("Write a short message to tell {name} that the {event} has been moved to {day}.",
         "Please text {name}: our {event} is now on {day}."),
        ("Hi {name}, a quick note: the {key}. See you there!",
         "Dear {name}, the {key}. Please let me know if that suits you."),
        "{event} is now on {day}",
        values,
    )  # fmt: skip


def calling(rng: random.Random) -> Family:
    (first, second), (one, two) = rng.sample(NAMES, 2), rng.sample(TOPICS, 2)
    asked = rng.randrange(2)
    values = {
        "n1": first, "n2": second, "t1": one, "t2": two, "topic": (one, two)[asked], "who": (first, second)[asked],
    }  # fmt: skip
    return (
        ("{n1} looks after the {t1} and {n2} after the {t2}. Who can help me with the {topic}?",
         "Whom do I call about the {topic}? {n1} knows the {t1}, {n2} knows the {t2}."),
        ("For the {topic}, call {key}.", "{key} is the one to ask about the {topic}."),
        "{who}",
        values,
    )  # fmt: skip


def change(rng: random.Random) -> Family:
    price = rng.randint(2, 9)
    note = rng.choice((10, 20))
    values = {"thing": rng.choice(GOODS).removesuffix("s"), "p": price, "note": note, "back": note - price}
    return (
        ("I pay for a {thing} of {p} euros with {note} euros. How much do I get back?",
         "A {thing} costs {p} euros and I hand over {note}. What is my change?"),
        ("Your change is {note} - {p} = {key}.", "You get {note} - {p} = {key} back for the {thing}."),
        "{back} euros",
        values,
    )  # fmt: skip


def plants(rng: random.Random) -> Family:
    values = {"plant": rng.choice(PLANTS), "n": rng.randint(2, 9), "light": rng.choice(LIGHT)}
    return (
        ("How do I look after my {plant}? The label says: {light}, water every {n} days.",
         "My {plant} came with a note: water every {n} days, keep {light}. What should I do?"),
        ("Water your {plant} {key}.", "Keep it simple: water the {plant} {key}."),
        "every {n} days and keep it {light}",
        values,
    )  # fmt: skip


def packing(rng: random.Random) -> Family:
    trip = rng.choice(sorted(TRIPS))
    one, two = rng.sample(TRIPS[trip], 2)
    values = {"trip": trip, "k": rng.randint(2, 9), "x": one, "y": two}
    return (
        ("What do I pack to go {trip} with {k} people if everyone needs {x} and {y}?",
         "Help me pack for {trip}: we are {k} and each of us needs {x} and {y}."),
        ("For {trip} with {k} people, pack {key}.", "Your list for {trip} is {key}."),
        "{k} {x} and {k} {y}",
        values,
    )  # fmt: skip


def driving(rng: random.Random) -> Family:
    hours, speed = rng.randint(2, 5), rng.choice((10, 20, 30, 40, 50, 60))
    values = {"h": hours, "v": speed, "far": hours * speed}
    return (
        (
            "How far do I get in {h} hours at {v} km an hour?",
            "I ride at {v} km an hour for {h} hours. How far is that?",
        ),
        ("In {h} hours you get {h} x {v} = {key} far.", "The distance is {h} x {v} = {key}."),
        "{far} km",
        values,
    )  # fmt: skip


def initials(rng: random.Random) -> Family:
    one, two, kind = *rng.sample(WORDS, 2), rng.choice(KINDS)
    values = {"full": f"{one} {two} {kind}", "short": one[0] + two[0] + kind[0]}
    return (
        ("What is a good abbreviation for {full}?", "Give me the initials of {full}."),
        ("A short form of {full} is {key}.", "{full} can be shortened to {key}."),
        "{short}",
        values,
    )


def finding(rng: random.Random) -> Family:
    values = {"shop": rng.choice(SHOPS), "n": rng.randint(2, 9), "side": rng.choice(("left", "right"))}
    return (
        ("How do I find the shop for {shop}? It is on floor {n}, to the {side} of the lift.",
         "The sign says: {shop}, floor {n}, {side} side. Tell me how to get there."),
        ("Take the lift to {key} to find {shop}.", "Go up to {key}; the {shop} are there."),
        "floor {n} and turn {side}",
        values,
    )  # fmt: skip


def devices(rng: random.Random) -> Family:
    device = rng.choice(sorted(DEVICES))
    one, two = rng.sample(DEVICES[device], 2)
    values = {"device": device, "x": one, "y": two, "n": rng.randint(3, 20)}
    return (
        ("How do I start the {device}? The manual says: {x}, {y}, wait {n} seconds.",
         "Explain how to use the {device}. Steps: {x}; {y}; wait {n} seconds."),
        ("To use the {device}, {key}.", "First of all, {key}. Then the {device} is ready."),
        "{x}, then {y} and wait {n} seconds",
        values,
    )  # fmt: skip


def invoices(rng: random.Random) -> Family:
    values = {
        "name": rng.choice(NAMES),
        "sum": rng.randint(11, 99),
        "day": rng.choice(DAYS),
        "what": rng.choice(TOPICS),
    }
    return (
        ("{name} sent a bill for the {what}: {sum} euros, due on {day}. What do I have to do?",
         "Sum up this note in one sentence: bill from {name}, {what} repair, {sum} euros, by {day}."),
        ("You have to pay {key} for the {what}.", "Please pay {key}; it is for the {what}."),
        "{sum} euros to {name} by {day}",
        values,
    )  # fmt: skip


FAMILIES: tuple[Callable[[random.Random], Family], ...] = (
    recipe, leaving, sorting, paying, sharing, later, moving, calling,
    change, plants, packing, driving, initials, finding, devices, invoices,
)  # fmt: skip
