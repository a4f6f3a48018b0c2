"""Drafts change how many forwards a text takes, never the text."""

import pytest
import torch

from fathom.config import ModelConfig
from fathom.generate.speculative import speculate
from fathom.model import build_model
from fathom.presets import preset
from fathom.probes.mtp import greedy
from fathom.settings import override, parse, to_data


def deepseek(*changes: str, seed: int = 0):
    cfg = parse(ModelConfig, override(to_data(preset("tiny-deepseek")), list(changes)))
    return build_model(cfg, seed=seed, dtype=torch.float64).eval()


PROMPTS = [[5], [1, 2, 3, 4, 5], list(range(40))]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("change", ["mtp.post_norm_hidden=true", "mtp.post_norm_hidden=false"])
def test_the_tokens_are_those_of_greedy_decoding(prompt, change):
    model = deepseek(change)
    found = speculate(model, prompt, 30)
    assert found.tokens == greedy(model, prompt, 30)
    assert found.drafts == found.forwards
    assert len(found.tokens) == 30


def test_a_model_that_always_agrees_with_its_drafts_needs_half_the_forwards():
    """With an output that depends on nothing, the model writes one token, and so does its MTP."""
    model = deepseek()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.mtp[0].norm.weight.zero_()
    found = speculate(model, [3, 4], 21)
    assert found.tokens == greedy(model, [3, 4], 21)
    assert found.accepted == found.drafts == 10
    assert found.forwards == 10


def test_a_model_that_never_agrees_loses_nothing_but_time():
    model = deepseek("tie_embeddings=false")
    with torch.no_grad():
        head = model.head.weight
        model.mtp[0].norm.weight.neg_()  # what the model finds likeliest its drafts find unlikely
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    found = speculate(model, [7, 8, 9], 20)
    assert found.tokens == greedy(model, [7, 8, 9], 20)


def test_the_last_token_may_be_the_first_of_a_pair():
    model = deepseek()
    for length in range(1, 8):
        assert speculate(model, [1, 2], length).tokens == greedy(model, [1, 2], length)


def test_what_cannot_draft_or_forget_is_refused():
    with pytest.raises(ValueError, match="no MTP module"):
        speculate(build_model(preset("tiny-llama")), [1], 4)
    with pytest.raises(ValueError, match="at most the model's context of"):
        speculate(deepseek(), [1], 10_000)
