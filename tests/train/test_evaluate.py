"""Held-out losses: against the logits, by hand."""

import math

import numpy as np
import pytest
import torch

from fathom.model import build_model
from fathom.train.evaluate import Evaluation, evaluate, last_evaluation
from fathom.train.metrics import JsonLines


@pytest.fixture
def model(make_config):
    return build_model(make_config("model.init_std=0.1").model, seed=2)


def by_hand(model, ids: np.ndarray, seq_len: int) -> float:
    """Nats of a document, piece by piece, from the full forward's logits."""
    nats = 0.0
    for start in range(0, len(ids) - 1, seq_len):
        piece = torch.tensor(ids[start : start + seq_len + 1].astype(np.int64))
        logits = model(piece[None, :-1])[0].double()
        nats -= logits.log_softmax(-1).gather(1, piece[1:, None]).sum().item()
    return nats


def test_bits_are_those_of_the_logits_document_by_document(model, dataset):
    result = evaluate(model, dataset, seq_len=32, batch_size=3)
    with torch.no_grad():
        for domain in dataset.domains:
            documents = range(dataset.documents("heldout", domain))
            ids = [dataset.document("heldout", domain, i) for i in documents]
            nats = [by_hand(model, document, 32) for document in ids]
            sizes = dataset.document_bytes("heldout", domain)
            sums = result.documents[domain]
            np.testing.assert_allclose(sums.nats, nats, rtol=1e-5)
            np.testing.assert_array_equal(sums.units, sizes)
            bits = {**result.by_domain, **result.symbols}[domain]
            assert bits == pytest.approx(sum(nats) / math.log(2) / sizes.sum(), rel=1e-5)


def test_images_stand_apart_from_the_mean_over_texts(model, dataset):
    result = evaluate(model, dataset, seq_len=32)
    assert set(result.by_domain) == {"prose", "code"}
    assert set(result.symbols) == {"image"}
    assert result.mean == pytest.approx(sum(result.by_domain.values()) / 2)


def test_without_a_text_domain_there_is_no_mean(model, dataset):
    result = evaluate(model, dataset, seq_len=32, domains=["image"])
    assert result.mean is None
    assert result.by_domain == {}


def test_the_result_does_not_depend_on_the_batch_size(model, dataset):
    one, many = (evaluate(model, dataset, seq_len=32, batch_size=n) for n in (1, 50))
    assert one.by_domain == pytest.approx(many.by_domain, rel=1e-6)


def test_a_byte_budget_reads_the_first_documents_only(model, dataset):
    whole = evaluate(model, dataset, seq_len=32)
    some = evaluate(model, dataset, seq_len=32, max_bytes=700)
    sums = some.documents["prose"]
    assert 600 < sums.units.sum() <= 700
    assert len(sums.units) < len(whole.documents["prose"].units)
    assert sums.nats[0] == pytest.approx(whole.documents["prose"].nats[0])


def test_the_model_stays_in_its_mode(model, dataset):
    for training in (True, False):
        evaluate(model.train(training), dataset, seq_len=32, domains=["image"])
        assert model.training is training


def test_autocast_is_used_and_near(model, dataset):
    precision = torch.autocast("cpu", torch.bfloat16)
    plain = evaluate(model, dataset, seq_len=32, domains=["prose"])
    narrow = evaluate(model, dataset, seq_len=32, domains=["prose"], precision=precision)
    assert plain.mean != narrow.mean
    assert narrow.mean == pytest.approx(plain.mean, rel=0.01)


def test_the_newest_line_of_the_file_is_read_back(tmp_path):
    assert last_evaluation(tmp_path / "eval.jsonl") is None
    lines = JsonLines(tmp_path / "eval.jsonl", upto=0)
    for step, mean in ((1, 3.0), (2, 2.5)):
        result = Evaluation(mean, {"prose": mean}, {"image": 1.0}, {})
        lines.write({"step": step, **result.record()})
    lines.close()
    assert last_evaluation(tmp_path / "eval.jsonl") == result
