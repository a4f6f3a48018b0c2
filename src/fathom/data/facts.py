"""Invented people, each with facts that stand nowhere else: how much can a model know?

After "Physics of language models, part 3.3" (Allen-Zhu & Li, arXiv:2404.05405): everybody has a
birth date, a city, a university, a field and an employer, drawn independently and uniformly. So a
person's facts hold a known number of bits, and nothing but having read them helps to tell them.
People held out show what can be said without: a model that knows the format alone.

Every name and place is made of syllables; a document is one person, the facts in a random order.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fathom.data.assemble import CorpusWriter
from fathom.data.corpus import Document
from fathom.data.shards import atomic_folder, refuse_existing
from fathom.data.sources import Problems
from fathom.data.tokenizer import train_tokenizer
from fathom.layers.base import require

DOMAIN = "people"
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
DAYS, YEARS = 28, 200
POOLS = {"city": 200, "school": 300, "field": 100, "firm": 263}  # as many as in the paper
CHOICES = {"born": len(MONTHS) * DAYS * YEARS, **POOLS}
NAMES = 400  # of first, middle and last names each, as in the paper
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def prepare_facts(
    out: str | Path, *, people: int, seed: int = 0, vocab_size: int = 1024, force: bool = False
) -> dict[str, Any]:
    """Write a folder that ``fathom train`` reads: one document for each of ``people``.

    One person in 50 is held out. The statistics keep how many choices each fact has, which is how
    the probe ``facts`` knows this corpus and its bits.

    Raises:
        ValueError: too few or too many people, or an ``out`` that exists.
    """
    most = NAMES**3
    require(200 <= people <= most, f"people must be 200 to {most:,}, got {people:,}")
    refuse_existing(Path(out), force=force)
    documents = list(biographies(people, seed))
    tokenizer = train_tokenizer([document.text for document in documents[:20_000]], vocab_size)
    with atomic_folder(Path(out), force=force) as folder:
        writer = CorpusWriter(folder, tokenizer)
        for document in documents:
            writer.add(DOMAIN, document)
        return writer.finish(0, Problems(), facts=CHOICES)


def biographies(people: int, seed: int) -> Iterator[Document]:
    """``"Zato Mirelu Kobi: born 7 May 1875; city Dabe; firm ...;"``, everybody another name."""
    draw = random.Random(seed)
    names = [words(NAMES, 3, draw) for _ in range(3)]
    pools = {fact: words(size, 2, draw) for fact, size in POOLS.items()}
    for number in draw.sample(range(NAMES**3), people):
        parts = (number // NAMES**2, number // NAMES % NAMES, number % NAMES)
        name = " ".join(pool[at] for pool, at in zip(names, parts, strict=True))
        facts = {fact: draw.choice(pool) for fact, pool in pools.items()}
        facts["born"] = (
            f"{draw.randint(1, DAYS)} {draw.choice(MONTHS)} {1800 + draw.randrange(YEARS)}"
        )
        order = draw.sample(sorted(facts), len(facts))
        yield Document(name, f"{name}: " + " ".join(f"{fact} {facts[fact]};" for fact in order))


def words(count: int, syllables: int, draw: random.Random) -> list[str]:
    """So many different words."""
    every = list(itertools.product(SYLLABLES, repeat=syllables))
    return ["".join(parts).capitalize() for parts in draw.sample(every, count)]


def values_in(text: str) -> Iterator[tuple[str, int, int]]:
    """Each fact of a biography and where its value stands: ``(fact, begin, end)`` in the text."""
    at = text.index(":") + 2
    for part in text[at:].split("; "):
        fact, value = part.rstrip(";").split(" ", 1)
        begin = at + len(fact) + 1
        yield fact, begin, begin + len(value)
        at += len(part) + 2
