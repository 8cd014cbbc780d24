"""float32 means float32 while numbers are made, whichever switches the user has set before."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import torch
{before}
from advbench.devices import full_float32, out_of_memory

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
def test_no_switch_of_the_user_stands_in_the_way(before: str) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT.format(before=before)], check=True, timeout=120)
