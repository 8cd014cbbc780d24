"""float32 means float32 while numbers are made, whichever switches the user has set before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from processes import run_script

from advbench.attacks.referee import Referee
from advbench.attacks.threat import Threat
from advbench.devices import tf32
from advbench.errors import UserError
from advbench.evaluation.resources import Resources
from advbench.training.settings import Settings

SCRIPT = """
import torch
{before}
from advbench.devices import full_float32, out_of_memory, tf32

backends = torch.backends
parts = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
newer = hasattr(backends.cuda.matmul, "fp32_precision")
state = lambda: [part.fp32_precision for part in parts] if newer else None


def precision():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "refused"


outside, said = state(), precision()
with full_float32():
    assert not newer or state() == ["ieee"] * 3, state()
    assert not backends.cuda.matmul.allow_tf32 and not backends.cudnn.allow_tf32
with tf32():
    assert not newer or state() == ["tf32", "tf32", "ieee"], state()
    assert backends.cuda.matmul.allow_tf32 and backends.cudnn.allow_tf32
    with full_float32():
        assert not backends.cuda.matmul.allow_tf32 and not backends.cudnn.allow_tf32
    assert backends.cuda.matmul.allow_tf32 and backends.cudnn.allow_tf32
assert state() == outside and precision() == said, (state(), precision())
for text in ("CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDNN_STATUS_ALLOC_FAILED",
             "GET was unable to find an engine to execute this computation"):
    assert out_of_memory(RuntimeError(text))
assert not out_of_memory(RuntimeError("shapes do not match"))
"""


@pytest.mark.parametrize(
    "before",
    [
        "",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.fp32_precision = 'ieee'",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    ],
)
def test_no_switch_of_the_user_stands_in_the_way(before: str, tmp_path: Path) -> None:
    run_script(SCRIPT.format(before=before), folder=tmp_path)


def test_tf32_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match=r"trainer\.precision=32"):
        Resources("cpu", precision="tf32")
    with pytest.raises(UserError, match=r"trainer\.precision=32-true"):
        Settings(precision="tf32").check(
            torch.nn.Linear(1, 1), cast(Any, None), torch.device("cpu"), 1
        )


def test_numbers_of_record_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The referee switches to it, whatever the search runs in."""
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return x.flatten(1)[:, :2]

    x = torch.rand(3, 1, 2, 2)
    with tf32():
        Referee(Model(), Threat("linf", 0.1), 16).judge(x, torch.zeros(3, dtype=torch.long), x)
    assert seen == [False]
