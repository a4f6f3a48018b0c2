"""The invented people: what stands in a biography, and that their bits are what is said."""

import math

import pytest

from fathom.data.facts import CHOICES, POOLS, biographies, prepare_facts, values_in


def test_every_person_has_another_name_and_each_fact_once():
    documents = list(biographies(500, seed=1))
    assert len({document.id for document in documents}) == 500
    for document in documents:
        assert document.text.startswith(document.id + ": ")
        assert sorted(fact for fact, _, _ in values_in(document.text)) == sorted(CHOICES)


def test_the_values_stand_where_they_are_said_to():
    text = "Zato Mirelu Kobi: born 7 May 1875; city Dabe; firm Seba;"
    found = {fact: text[begin:end] for fact, begin, end in values_in(text)}
    assert found == {"born": "7 May 1875", "city": "Dabe", "firm": "Seba"}


def test_values_are_drawn_evenly_from_pools_of_the_size_that_counts_the_bits():
    people = 30_000
    seen: dict[str, dict[str, int]] = {fact: {} for fact in POOLS}
    for document in biographies(people, seed=0):
        for fact, begin, end in values_in(document.text):
            if fact in POOLS:
                value = document.text[begin:end]
                seen[fact][value] = seen[fact].get(value, 0) + 1
    for fact, counts in seen.items():
        assert len(counts) == POOLS[fact]
        expected = people / POOLS[fact]
        chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
        assert chi2 < POOLS[fact] + 5 * math.sqrt(2 * POOLS[fact])


def test_the_same_seed_gives_the_same_people_and_another_seed_others():
    assert list(biographies(300, 7)) == list(biographies(300, 7))
    assert list(biographies(300, 7)) != list(biographies(300, 8))


@pytest.mark.parametrize("people", [0, 199, 400**3 + 1])
def test_too_few_or_too_many_people_are_refused_before_anything_is_written(tmp_path, people):
    with pytest.raises(ValueError, match="people must be 200 to"):
        prepare_facts(tmp_path / "out", people=people)
    assert not (tmp_path / "out").exists()
