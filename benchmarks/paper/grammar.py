"""Text from a small grammar, and tasks made of it: what a small decoder is trained and asked on.

Five tasks with the field names of the hub's data sets: sentiment (sst2), entailment (rte), yes-no
questions (boolq), cause and effect (copa), reading (squad). All of it follows from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def _words(text: str) -> list[str]:
    return text.split(", ")


PRAISE = _words(
    "wonderful, charming, brilliant, moving, funny, clever, graceful, thrilling, lovely, fresh"
)
BLAME = _words("boring, awful, clumsy, dull, tedious, ugly, stupid, lifeless, weak, stale")
SUBJECTS = _words(
    "the film, the story, the acting, the music, her performance, the script, this comedy, the end"
)
DEGREES = ("", "very ", "quite ", "really ", "truly ")
NAMES = _words("anna, peter, maria, john, laura, david, clara, thomas, helen, martin, rosa, victor")
CITIES = _words("paris, london, madrid, rome, berlin, vienna, lisbon, oslo, prague, dublin")
THINGS = _words("a car, a house, a horse, a piano, a boat, a painting, a clock, a camera")
JOBS = _words("a doctor, a teacher, a lawyer, a baker, a sailor, a writer, a painter, a farmer")
# What happens, and what follows from it.
EVENTS = (
    ("forgot the umbrella", "got wet in the rain"),
    ("dropped the glass", "swept up the pieces"),
    ("won the lottery", "bought a large house"),
    ("missed the bus", "came late to work"),
    ("ate too much cake", "had a stomach ache"),
    ("lost the keys", "could not open the door"),
    ("studied all night", "passed the exam"),
    ("ran a long race", "felt very tired"),
    ("broke a leg", "went to the hospital"),
    ("heard a joke", "laughed out loud"),
    ("left the oven on", "smelled smoke in the kitchen"),
    ("planted some seeds", "saw flowers in spring"),
)


def sentiment(draw: random.Random) -> Row:
    """A judgement; 'not' turns it round, and after 'but' the second half counts."""
    label = draw.randrange(2)
    subject = draw.choice(SUBJECTS)

    def judged(good: int) -> str:
        negated = draw.random() < 0.1
        words = PRAISE if good != negated else BLAME
        return f"{'not ' if negated else ''}{draw.choice(DEGREES)}{draw.choice(words)}"

    sentence = f"{subject} is {judged(label)}"
    if draw.random() < 0.15:
        other = draw.choice(SUBJECTS)
        sentence = f"{other} is {judged(1 - label)} , but {sentence}"
    return {"sentence": f"{sentence} .", "label": label}


def entailment(draw: random.Random) -> Row:
    """A purchase; the hypothesis repeats a part of it, or changes that part."""
    name, city, thing = draw.choice(NAMES), draw.choice(CITIES), draw.choice(THINGS)
    premise = f"{name} , who is {draw.choice(JOBS)} , bought {thing} in {city} ."
    label = draw.randrange(2)
    changed = draw.randrange(3) if label else None
    name = _other(draw, NAMES, name) if changed == 0 else name
    city = _other(draw, CITIES, city) if changed == 1 else city
    thing = _other(draw, THINGS, thing) if changed == 2 else thing
    owns = f"{name} bought {thing} ."
    was = f"{name} was in {city} ."
    hypothesis = owns if changed == 2 else was if changed == 1 else draw.choice((owns, was))
    return {"sentence1": premise, "sentence2": hypothesis, "label": label}


def question(draw: random.Random) -> Row:
    """Two people in two cities, and a question about one of them."""
    people, places = draw.sample(NAMES, 2), draw.sample(CITIES, 2)
    passage = " ".join(f"{p} lives in {c} ." for p, c in zip(people, places, strict=True))
    label, who = draw.randrange(2), draw.randrange(2)
    asked = f"does {people[who]} live in {places[who if label else 1 - who]}"
    return {"passage": passage, "question": asked, "label": label}


def cause(draw: random.Random) -> Row:
    """An event; what follows from it or led to it, and the same of another event."""
    right, wrong = draw.sample(EVENTS, 2)
    label, kind, name = draw.randrange(2), draw.randrange(2), draw.choice(NAMES)
    choices = [f"{name} {event[1 - kind]}." for event in (right, wrong)]
    if label:
        choices.reverse()
    asked = ("effect", "cause")[kind]
    row = {"premise": f"{name} {right[kind]}.", "question": asked, "label": label}
    return row | {"choice1": choices[0], "choice2": choices[1]}


def reading(draw: random.Random) -> Row:
    """Two people with a job and a city each, and a question whose answer stands in the text."""
    people, places, jobs = draw.sample(NAMES, 2), draw.sample(CITIES, 2), draw.sample(JOBS, 2)
    facts = zip(people, jobs, places, strict=True)
    context = " ".join(f"{p} is {j} and lives in {c} ." for p, j, c in facts)
    who, job = draw.randrange(2), draw.random() < 0.5
    asked = f"what is {people[who]}" if job else f"where does {people[who]} live"
    answer = jobs[who] if job else places[who]
    row = {"title": "people", "context": context, "question": f"{asked} ?"}
    return row | {"answers": {"text": [answer]}}


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "sst2": sentiment,
    "rte": entailment,
    "boolq": question,
    "copa": cause,
    "squad": reading,
}


def rows(task: str, count: int, seed: int) -> list[Row]:
    """``count`` rows of a task, none twice: a set drawn with another seed may share some."""
    draw, found = random.Random(f"{task} {seed}"), {}
    while len(found) < count:
        row = MAKERS[task](draw)
        found[str(row)] = row
    return list(found.values())


def _other(draw: random.Random, words: list[str], word: str) -> str:
    return draw.choice([w for w in words if w != word])
