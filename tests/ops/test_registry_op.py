"""What runs, what is refused, and the sentence that says why."""

import re

import pytest
import torch

from fathom.ops import OPS, attention, grouped_mm, table, why_not
from fathom.ops.registry import Implementations, autocast, choose, no_kernel, op, takes_all


def test_every_op_is_in_the_table_with_what_runs_where():
    rows = {row.op: row for row in table()}
    assert set(rows) == set(OPS)
    assert "triton" not in {row.cpu for row in rows.values()}
    for row in rows.values():  # bf16 on CUDA, without a tensor: a kernel runs, or it says why not
        assert (row.cuda == "triton") == (row.why_not == "")
    written = {name for name, row in rows.items() if "no Triton kernel" not in row.why_not}
    assert written >= {"experts", "permute", "router"}


def test_the_table_answers_for_a_dtype():
    rows = {row.op: row for row in table(torch.float64, torch.float32)}
    assert (rows["grouped_mm"].cpu, rows["grouped_mm"].cuda) == ("reference", "reference")


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.float32, r"needs bfloat16 on CUDA, got torch\.float32"),
        ("cpu", torch.float64, r"needs float32, bfloat16 or float16, got torch\.float64"),
    ],
)
def test_why_not_names_what_is_missing(device, dtype, reason):
    assert re.search(reason, why_not("grouped_mm", device, dtype, impl="torch"))


def test_why_not_is_empty_for_what_runs():
    assert why_not("grouped_mm", "cuda", torch.bfloat16, impl="torch") == ""
    assert why_not("attention", "cpu", impl="reference") == ""


@pytest.mark.parametrize("op", OPS)
def test_a_forced_kernel_is_refused_with_the_way_out(op):
    with pytest.raises(
        ValueError, match=r"cannot run: .* pass impl='auto' for '(torch|reference)'"
    ):
        choose(OPS[op], "triton", torch.ones(4, 4), torch.ones(1, 4, 4))


def test_the_first_that_can_run_is_taken():
    never = Implementations(op="never", refusals={"triton": no_kernel, "reference": takes_all})
    always = Implementations(op="always", refusals={"triton": takes_all, "reference": takes_all})
    assert choose(never, "auto", torch.ones(1)) == "reference"
    assert choose(always, "auto", torch.ones(1)) == "triton"


def test_an_op_may_take_its_tensors_in_a_list():
    @op("sum_of_a_list", fake=lambda tensors: tensors[0].clone(), flops=lambda *_: 0)
    def sum_of_a_list(tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0] + tensors[1]

    assert sum_of_a_list([torch.ones(1), torch.ones(1)]) == 2


def test_ops_refuse_rather_than_swap():
    x, w, ends = torch.ones(2, 4), torch.ones(1, 4, 4), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        grouped_mm(x, w, ends, impl="triton")
    with pytest.raises(ValueError, match="impl='triton' cannot run"):
        attention(*(torch.ones(1, 2, 1, 4),) * 3, scale=1.0, impl="triton")


def test_an_unknown_implementation_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'cuda' is not known to grouped_mm: it has auto, triton"):
        choose(OPS["grouped_mm"], "cuda", torch.ones(4, 4), torch.ones(1, 4, 4))


def test_a_forced_reference_runs_where_torch_would():
    tensors = torch.ones(4, 4), torch.ones(1, 4, 4)
    assert choose(OPS["grouped_mm"], "reference", *tensors) == "reference"
    assert choose(OPS["grouped_mm"], "auto", *tensors) == "torch"


def test_autocast_narrows_float32_alone():
    tensors = torch.ones(1), torch.ones(1, dtype=torch.float64), torch.ones(1).half()
    assert autocast(*tensors) == tensors
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [t.dtype for t in autocast(*tensors)]
    assert dtypes == [torch.bfloat16, torch.float64, torch.float16]
