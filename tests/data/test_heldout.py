from itertools import chain, pairwise

import pytest
import torch

from fathom.data.loader import IGNORE, heldout_batches

TEXTS = ["a long document " * 20, "x", "short one", "mid-sized document " * 6, "六七八九十"]


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(a=(["train"], TEXTS))


def predicted(batches) -> dict[int, list[int]]:
    """Targets by document, in the order in which they come."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        kept = batch.targets != IGNORE
        for document, target in zip(
            batch.documents[kept].tolist(), batch.targets[kept].tolist(), strict=True
        ):
            found.setdefault(document, []).append(target)
    return found


@pytest.mark.parametrize("seq_len", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_held_out_token_is_predicted_exactly_once(dataset, seq_len, batch_size):
    batches = heldout_batches(dataset, "a", seq_len=seq_len, batch_size=batch_size)
    want = {i: dataset.document("heldout", "a", i)[1:].tolist() for i in range(len(TEXTS))}
    assert predicted(batches) == want


def test_targets_are_the_next_tokens_and_padding_is_marked(dataset):
    for batch in heldout_batches(dataset, "a", seq_len=16, batch_size=2):
        assert batch.tokens.shape == batch.targets.shape == batch.documents.shape
        assert ((batch.targets == IGNORE) == (batch.documents == -1)).all()
        borders = batch.cu_seqlens.tolist()
        assert borders[0] == 0
        assert borders[-1] == batch.tokens.numel()
        assert set(range(0, borders[-1], 16)) <= set(borders)
        owners, tokens = batch.documents.flatten(), batch.tokens.flatten()
        for a, b in pairwise(borders):
            assert len(set(owners[a:b].tolist())) == 1
            if owners[a] >= 0:
                assert torch.equal(tokens[a + 1 : b], batch.targets.flatten()[a : b - 1])


def test_short_documents_share_a_row(dataset):
    [batch] = heldout_batches(dataset, "a", seq_len=4096, batch_size=8)
    assert batch.tokens.shape == (1, 4096)
    assert len(batch.cu_seqlens) == len(TEXTS) + 2  # one border each, the padding's, and the end


def contexts(batches) -> set[tuple[int, ...]]:
    """The tokens of every piece: what a loss can depend on."""
    found = set()
    for batch in batches:
        borders, tokens = batch.cu_seqlens.tolist(), batch.tokens.flatten().tolist()
        owners = batch.documents.flatten().tolist()
        pairs = pairwise(borders)
        found |= {(owners[a], *tokens[a:b]) for a, b in pairs if owners[a] >= 0}
    return found


def test_what_a_token_sees_depends_on_its_document_alone(dataset):
    one, many = (contexts(heldout_batches(dataset, "a", seq_len=16, batch_size=n)) for n in (1, 5))
    assert one == many
    first = contexts(heldout_batches(dataset, "a", seq_len=16, batch_size=5, max_bytes=320))
    assert first == {piece for piece in one if piece[0] == 0}


@pytest.mark.parametrize("max_bytes", [1, 10, 320, 321, 322, 325, 10**9])
def test_a_budget_takes_whole_documents_in_order_and_cuts_the_last(dataset, max_bytes):
    batches = heldout_batches(dataset, "a", seq_len=16, batch_size=4, max_bytes=max_bytes)
    found = predicted(batches)
    sizes = dataset.tokenizer.token_bytes
    spent = {document: int(sizes[targets].sum()) for document, targets in found.items()}
    assert list(found) == list(range(len(found)))
    for document, targets in found.items():
        whole = dataset.document("heldout", "a", document)[1:].tolist()
        assert targets == whole[: len(targets)]
        if document < len(found) - 1:
            assert len(targets) == len(whole)
    every = sum(len(text.encode()) for text in TEXTS)
    longest = int(sizes.max())
    assert min(max_bytes, every) - longest < sum(spent.values()) <= max(max_bytes, longest)


def test_a_budget_of_images_counts_pixels(bundled):
    batches = heldout_batches(bundled, "image", seq_len=256, batch_size=4, max_bytes=640)
    targets = torch.tensor(list(chain(*predicted(batches).values())))
    assert bundled.tokenizer.is_symbol[targets].sum() == 640


def test_the_rows_of_the_bundled_corpus_are_nearly_full(bundled):
    for domain in ("prose", "zh", "code", "maths"):
        batches = list(heldout_batches(bundled, domain, seq_len=256, batch_size=16))
        kept = sum(int((batch.documents >= 0).sum()) for batch in batches)
        assert kept == bundled.tokens("heldout", domain) - bundled.documents("heldout", domain)
        assert kept > 0.95 * sum(batch.documents.numel() for batch in batches)
