"""What ``results.json`` says besides the arms."""

from pathlib import Path

import pytest

from fathom.ladder.about import repeat_command
from fathom.ladder.study import load_study


@pytest.mark.parametrize(
    ("overrides", "study", "settings"),
    [
        ([], "share-kv", ""),
        (["data.source=my data"], "share-kv", " 'data.source=my data'"),
        (["budget.value=1e6"], "runs/a/study.toml", ""),
        (["name=mine"], "runs/a/study.toml", ""),
    ],
)
def test_a_study_is_repeated_by_its_name_where_that_says_it_all(overrides, study, settings):
    command = repeat_command(load_study("share-kv", overrides), Path("runs/a"))
    assert command == f"fathom ladder {study} --out runs/a{settings}"
