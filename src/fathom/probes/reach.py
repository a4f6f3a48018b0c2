"""How far a token can be found by its distance alone, with the model's own keys.

For each layer and key head: the *ideal query* for the token at distance d is the mean key turned to
that token's place. It finds the token if its score is the highest of all tokens in the context.
The keys are those of held-out text, before rotation, set at places 0 to ``context - 1``, also
beyond the trained length. What keeps the query from its token is content that varies more than
position tells, and RoPE's waves repeating. Without rotation no query can point at a place: chance.

This is what the position code allows the best head, not what the model does. The slowest wave
repeats after ``2 pi theta**((D-2)/D)`` tokens, and from half of that on it gives a distance and its
mirror image, wavelength - distance, the same score. *Mirror* looks for that in the score of all
waves together, for a query that has a key's own phases: 1 if distance and image look the same.

Shapes: N tokens of the context, G key heads, R rotated width, P = R/2 pairs, M targets,
S distances.
"""

import torch
from torch import Tensor

from fathom.data.dataset import Dataset
from fathom.layers.rope import Rope
from fathom.model import Decoder
from fathom.ops.rope import rotate
from fathom.probes.base import Context, Record, attention_inputs, attentions, longest_passage

TARGETS = 64  # tokens looked for in each context
CONTEXTS = (16, 64, 256, 1024, 4096)
DISTANCES = 4096  # looked at between 0 and half the longest wave


@torch.no_grad()
def run(model: Decoder, dataset: Dataset, context: Context) -> Record:
    keys = [layer_keys for layer_keys in _keys(model, dataset, context) if layer_keys is not None]
    if not keys:
        return {"context": list(CONTEXTS), "accuracy": [1 / n for n in CONTEXTS]}
    accuracy = []
    for length in CONTEXTS:
        found = [find_accuracy(key_NGR, rope, length, context.seed) for key_NGR, rope in keys]
        accuracy.append(torch.cat(found).max().item())
    wave = longest_wave(keys[0][1])
    mirrors = torch.cat([mirror(key_NGR.mean(0), rope) for key_NGR, rope in keys])
    return {
        "context": list(CONTEXTS),
        "accuracy": accuracy,
        "longest_wavelength": wave,
        "half_wavelength": wave / 2,
        "mirror": mirrors.mean().item(),
    }


def _keys(model: Decoder, dataset: Dataset, context: Context) -> list[tuple[Tensor, Rope] | None]:
    """Each layer's unrotated keys of held-out text, ``[N, G, R]``, for the longest context."""
    rows = -(-CONTEXTS[-1] // context.seq_len)
    passage = longest_passage(model, dataset, rows * context.seq_len, context.seed)
    with attention_inputs(model) as inputs:
        model(passage.view(rows, context.seq_len))
    found = []
    for part, (x_BTD, _) in zip(attentions(model), inputs, strict=True):
        keys = part.position_keys(x_BTD)
        found.append(None if keys is None else (keys[0].flatten(0, 1).float().cpu(), keys[1]))
    return found


def longest_wave(rope: Rope) -> float:
    """Tokens after which the slowest pair has turned once."""
    return 2 * torch.pi / rope.frequencies(CONTEXTS[-1]).min().item()


def mirror(key_GR: Tensor, rope: Rope) -> Tensor:
    """Correlation of scores at distances up to half the longest wave with their images', ``[G]``.

    A query in phase with a key scores ``sum_p |k_p|^2 cos(f_p d)`` at distance d.
    """
    wave = longest_wave(rope)
    power_GP = key_GR.double().unflatten(-1, (2, -1)).square().sum(-2)
    frequency_P = rope.frequencies(CONTEXTS[-1]).double().cpu()
    distance_S = torch.linspace(0, wave / 2, DISTANCES, dtype=torch.float64)

    def score(distance_S: Tensor) -> Tensor:
        score_GS = power_GP @ torch.cos(frequency_P[:, None] * distance_S)
        return score_GS - score_GS.mean(-1, keepdim=True)

    there_GS, image_GS = score(distance_S), score(wave - distance_S)
    return torch.nn.functional.cosine_similarity(there_GS, image_GS, dim=-1)


def find_accuracy(key_NGR: Tensor, rope: Rope, length: int, seed: int) -> Tensor:
    """Share of targets that the ideal query finds among ``length`` tokens, ``[G]``."""
    keys = key_NGR[:length]
    angles = rope.angles(torch.arange(length)[None], length)
    turned_NGR = rotate(keys[None], *angles)[0].double()
    generator = torch.Generator().manual_seed(seed)
    target_M = torch.randperm(length, generator=generator)[:TARGETS]
    mean_GR = key_NGR.mean(0)
    queries = mean_GR[None, None].expand(1, len(target_M), -1, -1)
    query_MGR = rotate(queries, *rope.angles(target_M[None], length))[0].double()
    found_MG = torch.einsum("mgr,ngr->mgn", query_MGR, turned_NGR).argmax(-1)
    return (found_MG == target_M[:, None]).double().mean(0)
