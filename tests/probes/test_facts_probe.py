"""The facts probe on models whose knowledge is known: a lookup table, a format, and nothing."""

import math

import pytest
import torch
from torch import nn

from fathom.data.config import DataConfig
from fathom.data.dataset import Dataset, open_dataset
from fathom.data.facts import CHOICES, DOMAIN, prepare_facts
from fathom.model import build_model
from fathom.presets import preset
from fathom.probes import PROBES, Context
from fathom.probes.facts import parts, stored, value_tokens, zeroed

CONTEXT = Context(seq_len=64, batch_size=32)
BITS = sum(map(math.log2, CHOICES.values()))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts") / "people"
    prepare_facts(folder, people=300, vocab_size=400)
    return Dataset(folder)


class Table(nn.Module):
    """Looks the whole document up by its first tokens; of others it says that all is equal."""

    def __init__(self, dataset: Dataset, people: range) -> None:
        super().__init__()
        self.embed = nn.Embedding(dataset.vocab_size, 1)
        documents = [dataset.document("train", DOMAIN, i).tolist() for i in people]
        self.known = {tuple(ids[:14]): ids for ids in documents}

    def forward(self, rows_BT):
        logits = torch.zeros(*rows_BT.shape, self.embed.num_embeddings)
        for row, out in zip(rows_BT.tolist(), logits, strict=True):
            ids = self.known.get(tuple(row[:14]), [])
            for at, following in enumerate(ids[1 : len(row) + 1]):
                out[at, following] = 100.0
        return logits


def test_a_lookup_table_stores_exactly_the_facts_of_its_people(people):
    n = people.documents("train", DOMAIN)
    bits, known = stored(Table(people, range(n)), people, "train", CHOICES, CONTEXT)
    assert sum(bits.values()) == pytest.approx(BITS, rel=1e-6)
    assert known.all()
    assert len(known) == n * len(CHOICES)


def test_half_a_table_knows_half_the_facts(people):
    n = people.documents("train", DOMAIN)
    _, known = stored(Table(people, range(n // 2)), people, "train", CHOICES, CONTEXT)
    assert known.double().mean() == pytest.approx(n // 2 / n)


def test_nobody_knows_people_never_seen(people):
    n = people.documents("train", DOMAIN)
    bits, known = stored(Table(people, range(n)), people, "heldout", CHOICES, CONTEXT)
    assert not known.any()
    assert all(value < 0 for value in bits.values())  # it does not even know the format


def test_the_ids_of_a_value_spell_it(people):
    ids = people.document("train", DOMAIN, 3).tolist()
    text = people.tokenizer.decode(ids[1:-1])
    for fact, begin, end in value_tokens(people, ids):
        piece = people.tokenizer.decode(ids[begin:end])
        assert f"{fact}{piece}" in text or piece.strip() in text


def test_a_part_that_is_zeroed_comes_back():
    model = build_model(preset("tiny-moe"), seed=0)
    for block in model.blocks:
        for weight in parts(block.ffn):
            before = weight.clone()
            with zeroed(weight):
                assert not weight.any()
            assert torch.equal(weight, before)


def test_the_record_counts_per_parameter_and_says_what_removal_costs(people, monkeypatch):
    monkeypatch.setattr("fathom.probes.facts.PARTS", 2)
    model = build_model(preset("tiny-llama"), seed=0)
    table = Table(people, range(people.documents("train", DOMAIN)))
    answer = table.forward
    model.forward = lambda rows: answer(rows)  # what it says; its size and layers are its own
    record = PROBES["facts"].run(model, people, CONTEXT)
    assert record["bits_stored"] == pytest.approx(record["bits_in_data"])
    assert record["facts_known"] == 1
    assert record["bits_per_person_unseen"] < 0
    assert record["lost_without_it"] == [0.0] * len(model.blocks)  # a table loses nothing


def test_another_corpus_has_no_facts_to_count():
    dataset = open_dataset(DataConfig())
    assert PROBES["facts"].run(build_model(preset("tiny-llama"), seed=0), dataset, CONTEXT) == {}
