import subprocess
import sys

import pytest

from fathom.data.config import DataConfig


def test_importing_the_configuration_brings_no_torch():
    code = "import sys, fathom.data.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"source": ""}, "data.source must be"),
        ({"tokenizer": "2k"}, 'data.tokenizer must be "1k" or "4k", got \'2k\''),
        ({"workers": -1}, "data.workers must be 0 to 64, got -1"),
        ({"workers": 65}, "data.workers must be 0 to 64, got 65"),
        ({"weights": {"zh": -0.5}}, "data.weights.zh must be a finite number of at least 0"),
        ({"weights": {"zh": float("nan")}}, "data.weights.zh must be a finite number"),
        ({"weights": {"zh": 0.0, "code": 0.0}}, "data.weights are all 0"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_name(given, sentence):
    with pytest.raises(ValueError, match=r".") as refused:
        DataConfig(**given)
    assert sentence in str(refused.value)
