"""The kinds of word problem ``make_task`` asks: each draws its numbers and says how question and answer are worded.

A family returns ``(prompts, answer, values)``: templates over ``values``, which holds the result as ``answer``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Family = tuple[tuple[str, ...], str, dict[str, Any]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ana Ben Carla David Elif Farid Grace Hugo Ines Jonas Kofi Lena Marek Nora Omar Petra Quentin Rosa Sven "
    "Tara Uma Viktor Wanda Yara Zoe Aiko Bruno Chloe Dmitri Esther"
)
THINGS = _words("apples pears plums nuts shells stamps pens books cards marbles cookies buttons tickets beads")
ANIMALS = {"hens": 2, "ducks": 2, "goats": 4, "cows": 4, "sheep": 4, "geese": 2}


def shopping(rng: random.Random) -> Family:
    count, price = rng.randint(2, 5), rng.randint(2, 5)
    values = {"name": rng.choice(NAMES), "things": rng.choice(THINGS), "n": count, "k": price, "answer": count * price}
    return (
        (
            "{name} buys {n} {things} at the market. Each of them costs {k} dollars. How much does {name} pay?",
            "At the shop of {name} a bag of {things} costs {k} dollars. What do {n} bags cost together?",
        ),
        "One costs {k} dollars, so {n} of them cost {n} x {k} = {answer} dollars.\nThe answer is {answer}.",
        values,
    )


def gift(rng: random.Random) -> Family:
    before, more = rng.randint(3, 8), rng.randint(2, 5)
    first, second = rng.sample(NAMES, 2)
    values = {"a": first, "b": second, "things": rng.choice(THINGS), "n": before, "k": more, "answer": before + more}
    return (
        (
            "{a} has {n} {things} in a box. {b} comes to visit and brings {k} more. How many are in the box now?",
            "In the morning {a} finds {n} {things}, and in the evening {b} adds {k}. How many {things} are there?",
        ),
        "First there are {n} {things}. With {k} more there are {n} + {k} = {answer}.\nThe answer is {answer}.",
        values,
    )


def loss(rng: random.Random) -> Family:
    before, less = rng.randint(6, 11), rng.randint(1, 4)
    values = {"a": rng.choice(NAMES), "things": rng.choice(THINGS), "n": before, "k": less, "answer": before - less}
    return (
        (
            "{a} carries {n} {things} home and loses {k} of them on the way. How many does {a} still have?",
            "There were {n} {things} on the table of {a}. The cat pushed {k} of them off. How many stayed there?",
        ),
        "At first there were {n} {things}. Without {k} of them there are {n} - {k} = {answer}.\n"
        "The answer is {answer}.",
        values,
    )


def sharing(rng: random.Random) -> Family:
    children, each = rng.randint(2, 4), rng.randint(2, 5)
    values = {"a": rng.choice(NAMES), "things": rng.choice(THINGS), "n": children * each, "k": children, "answer": each}
    return (
        (
            "{a} shares {n} {things} equally among {k} children at a party. How many does each child get?",
            "A bag of {n} {things} is split between {a} and friends, {k} people in all. How many does each one get?",
        ),
        "There are {n} {things} for {k} people, and {n} / {k} = {answer}.\nThe answer is {answer}.",
        values,
    )


def legs(rng: random.Random) -> Family:
    kind = rng.choice(tuple(ANIMALS))
    count = rng.randint(2, 5)
    values = {"a": rng.choice(NAMES), "kind": kind, "n": count, "k": ANIMALS[kind], "answer": count * ANIMALS[kind]}
    return (
        (
            "On the farm of {a} there are {n} {kind}. How many legs do they have together?",
            "{a} sees {n} {kind} behind the house and counts their legs. What number does {a} get?",
        ),
        "Each of the {n} {kind} has {k} legs, so together they have {n} x {k} = {answer}.\nThe answer is {answer}.",
        values,
    )


FAMILIES: tuple[Callable[[random.Random], Family], ...] = (shopping, gift, loss, sharing, legs)
