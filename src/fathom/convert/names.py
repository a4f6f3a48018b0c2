"""Other projects' tensor names as those of Hugging Face, and files that hold slices of tensors.

DeepSeek's own names come from the conversion script of the DeepSeek-V3 repository, Meta's from
Llama's. A wrapper of this kind moves no tensor; how rows are ordered is for the rules to say.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fathom.convert.run_folder import CheckpointError
from fathom.convert.source import Entry, TensorSource

FRAME = {
    "embed_tokens": "model.embed_tokens",
    "embed": "model.embed_tokens",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "output": "lm_head",
}
LAYER = {
    "attn": "self_attn",
    "attention": "self_attn",
    "ffn": "mlp",
    "feed_forward": "mlp",
    "attn_norm": "input_layernorm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "scale": "weight_scale_inv",
}
INDEXER = {name: LAYER[name] for name in ("attn", "scale")}  # all others are Hugging Face's already


def to_hugging_face(name: str) -> str:
    """``layers.3.ffn.experts.7.w1.weight`` as ``model.layers.3.mlp.experts.7.gate_proj.weight``."""
    first, *rest = name.split(".")
    if first != "layers":
        return ".".join([FRAME.get(first, first), *rest])
    if rest[-2:] == ["gate", "bias"]:  # routing only, and not a bias of the product
        rest[-1] = "e_score_correction_bias"
    names = INDEXER if "indexer" in rest else LAYER
    return ".".join(["model.layers", *(names.get(part, part) for part in rest)])


class Renamed(TensorSource):
    """A source under other names; None leaves a tensor out.

    Raises:
        CheckpointError: two tensors would have one name.
    """

    def __init__(self, source: TensorSource, rename: Callable[[str], str | None]) -> None:
        self._source = source
        self._theirs: dict[str, str] = {}
        for theirs in source.entries:
            name = rename(theirs)
            if name in self._theirs:
                raise CheckpointError(f"{self._theirs[name]!r} and {theirs!r} are one tensor")
            if name is not None:
                self._theirs[name] = theirs
        self._entries = {name: source.entries[theirs] for name, theirs in self._theirs.items()}

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        return self._source.read(self._theirs[name])

    def release(self, name: str) -> None:
        self._source.release(self._theirs[name])


def without_prefix(source: TensorSource, prefix: str) -> TensorSource:
    """The tensors whose names begin with ``prefix``, without it; the others are left out."""
    return Renamed(source, lambda name: name[len(prefix) :] if name.startswith(prefix) else None)


SLICED = {  # DeepSeek's names: the dimension that is split over the ranks of a model
    **dict.fromkeys(("embed", "head", "wq", "wq_b", "wkv_b", "w1", "w3"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}
RANK_FILE = re.compile(r"model(\d{1,4})-mp(\d{1,4})\.safetensors")
EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.\d+\..*")


def rank_files(names: Sequence[str]) -> list[str]:
    """Those of a folder's files that are ranks of one model, in order; empty: there are none.

    Raises:
        CheckpointError: a rank is not there.
    """
    found = {(int(m[2]), int(m[1])): m[0] for m in map(RANK_FILE.fullmatch, names) if m}
    if found and sorted(found) != [(len(found), rank) for rank in range(len(found))]:
        raise CheckpointError("some of the files model<rank>-mp<ranks>.safetensors are not there")
    return [found[key] for key in sorted(found)]


class Ranks(TensorSource):
    """The slices of DeepSeek's ``model{rank}-mp{N}.safetensors`` as whole tensors.

    A routed expert lies whole with one rank; what no rank splits is taken from the first.

    Raises:
        CheckpointError: the ranks hold other tensors or shapes than one another.
    """

    def __init__(self, ranks: Sequence[TensorSource]) -> None:
        self._ranks = ranks
        self._homes: dict[str, list[TensorSource]] = {}
        for rank in ranks:
            for name in rank.entries:
                self._homes.setdefault(name, []).append(rank)
        self._entries = {name: self._entry(name, homes) for name, homes in self._homes.items()}

    def _entry(self, name: str, homes: list[TensorSource]) -> Entry:
        found = [rank.entries[name] for rank in homes]
        expected = 1 if EXPERT.fullmatch(name) else len(self._ranks)
        if len(found) != expected or any(entry != found[0] for entry in found):
            raise CheckpointError(f"the ranks do not agree on the tensor {name!r}")
        dim, shape = self._dim(name), list(found[0].shape)
        if dim is None:
            return found[0]
        if dim >= len(shape):
            raise CheckpointError(f"the tensor {name!r} has no dimension {dim} to be split in")
        shape[dim] *= len(found)
        return Entry(tuple(shape), found[0].dtype, found[0].num_bytes * len(found))

    def _dim(self, name: str) -> int | None:
        parts = name.split(".")
        whole = EXPERT.fullmatch(name) or "indexer" in parts or parts[-1] == "bias"
        sliced = len(parts) > 1 and not whole
        return SLICED.get(parts[-2]) if sliced else None

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        homes, dim = self._homes[name], self._dim(name)
        if dim is None or len(homes) == 1:
            return homes[0].read(name)
        return torch.cat([rank.read(name) for rank in homes], dim=dim)

    def release(self, name: str) -> None:
        for rank in self._homes[name]:
            rank.release(name)
