"""Tiny models of transformers, each made once in a session."""

from collections.abc import Callable

import pytest

from peers import CASES, Peer, make_peer


@pytest.fixture(scope="session")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peer]:
    """The model of a case: its folder, logits and greedy tokens."""
    made: dict[str, Peer] = {}

    def make(name: str) -> Peer:
        if name not in made:
            made[name] = make_peer(CASES[name], tmp_path_factory.mktemp("peer") / name)
        return made[name]

    return make
