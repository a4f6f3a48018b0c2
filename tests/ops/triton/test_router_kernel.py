"""The router's kernel chooses what a stable sort chooses: ties, infinities and odd sizes too."""

import pytest
import torch

from fathom.ops.router import best_experts_reference
from fathom.ops.triton.router import best_experts

CASES = {  # tokens, experts, top_k, groups, kept, top_two
    "one": (1, 1, 1, 1, 1, False),
    "plain": (67, 64, 6, 1, 1, False),
    "odd": (5, 77, 7, 1, 1, False),
    "all": (3, 8, 8, 1, 1, False),
    "many": (9, 600, 16, 1, 1, False),
    "v2": (33, 160, 6, 8, 3, False),
    "v3": (17, 256, 8, 8, 4, True),
    "odd-groups": (11, 21, 5, 7, 2, True),
    "none": (0, 8, 2, 1, 1, False),
}


def agree(scores, top_k, groups, kept, top_two):
    got = best_experts(scores, top_k, groups, kept, top_two=top_two)
    want = best_experts_reference(scores.cpu(), top_k, groups, kept, top_two=top_two)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_choice_is_that_of_the_definition(case, device):
    tokens, experts, *rest = case
    agree(torch.randn(tokens, experts, device=device), *rest)


@pytest.mark.parametrize("case", [(40, 32, 4, 1, 1, False), (40, 32, 4, 8, 2, False)])
def test_of_equal_scores_the_lowest_index_wins(case, device):
    tokens, experts, *rest = case
    few = torch.randint(-1, 2, (tokens, experts), device=device).float()
    agree(few, *rest)
    agree(few * 0.0, *rest)  # zeros of either sign are equal


def test_infinite_scores_have_their_place(device):
    scores = torch.tensor([[0.0, -torch.inf, torch.inf, -3.0]], device=device)
    assert best_experts(scores, 4, 1, 1, top_two=False).tolist() == [[2, 0, 3, 1]]


def test_a_nan_is_chosen_first_and_no_index_twice(device):
    scores = torch.tensor([[1.0, torch.nan, 2.0, torch.nan]], device=device)
    assert best_experts(scores, 3, 1, 1, top_two=False).tolist() == [[1, 3, 2]]
