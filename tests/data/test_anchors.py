import lzma
import math
from collections import Counter

import pytest

from fathom.data import anchors
from fathom.data.anchors import (
    mean_over_domains,
    order2_bits_per_byte,
    text_domains,
    xz_bits_per_byte,
)

TRAIN = {"a": ["the cat sat", "the mat"], "b": ["猫坐在", ""]}
HELDOUT = {"a": ["the cat", "a"], "b": ["猫猫"]}


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(**{name: (TRAIN[name], HELDOUT[name]) for name in TRAIN})


def order2_by_hand(domain):
    counts, contexts = Counter(), Counter()
    for text in [text for texts in TRAIN.values() for text in texts]:
        padded = b"\0\0" + text.encode()
        for i in range(2, len(padded)):
            counts[padded[i - 2 : i + 1]] += 1
            contexts[padded[i - 2 : i]] += 1
    bits, n = 0.0, 0
    for text in HELDOUT[domain]:
        padded = b"\0\0" + text.encode()
        for i in range(2, len(padded)):
            p = (counts[padded[i - 2 : i + 1]] + 0.1) / (contexts[padded[i - 2 : i]] + 25.6)
            bits, n = bits - math.log2(p), n + 1
    return bits / n


@pytest.mark.parametrize("chunk", [1, 12, 2**24])
def test_the_order_2_model_equals_counting_by_hand(dataset, monkeypatch, chunk):
    monkeypatch.setattr(anchors, "CHUNK", chunk)
    want = {domain: order2_by_hand(domain) for domain in TRAIN}
    assert order2_bits_per_byte(dataset) == pytest.approx(want, rel=1e-12)


def test_xz_counts_what_the_held_out_text_adds_to_the_training_text(dataset):
    def size(content):
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    train, heldout = "".join(TRAIN["a"]).encode(), "".join(HELDOUT["a"]).encode()
    added, alone = size(train + heldout) - size(train), size(heldout)
    assert xz_bits_per_byte(dataset)["a"] == 8 * added / len(heldout)
    assert xz_bits_per_byte(dataset, with_training=False)["a"] == 8 * alone / len(heldout)


def test_the_bundled_corpus_has_the_anchors_that_reports_quote(bundled):
    assert text_domains(bundled) == ["prose", "zh", "code", "maths"]
    order2 = order2_bits_per_byte(bundled)
    want = {"prose": 2.8907, "zh": 3.3017, "code": 2.9279, "maths": 3.6252}
    assert order2 == pytest.approx(want, abs=1e-4)
    assert mean_over_domains(order2) == pytest.approx(3.1864, abs=1e-4)
    xz = xz_bits_per_byte(bundled)
    want = {"prose": 2.2151, "zh": 3.1440, "code": 1.6038, "maths": 2.3650}
    assert xz == pytest.approx(want, abs=0.01)  # liblzma may change a little
