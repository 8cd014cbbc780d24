"""Files of a training: written whole, read with care."""

from __future__ import annotations

import pytest
import torch
from small import (
    assert_same_weights,
    net,
)
from torch import nn

from advbench.errors import UserError
from advbench.experiments.checkpoints import load_weights
from advbench.training.checkpoint import (
    remove_leftovers,
    save_weights,
)
from advbench.training.metrics import write_table
from advbench.training.summary import Summary

# Files


def test_what_killed_writers_leave_is_removed(tmp_path):
    for name in (".model.safetensors.12.tmp", ".tmpAb1", "metrics.csv"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_weights_of_another_model_are_refused(tmp_path):
    model = net()
    save_weights(model, tmp_path / "model.safetensors")
    other = net()
    nn.utils.vector_to_parameters(torch.zeros(200), other.parameters())
    load_weights(other, tmp_path / "model.safetensors")
    assert_same_weights(other, model)
    with pytest.raises(UserError, match="do not match the model"):
        load_weights(net(plain=True), tmp_path / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name, message in (
        ("broken.safetensors", "is not a safetensors file"),
        ("missing.safetensors", "there are no weights at"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(net(), tmp_path / name)


def test_weights_that_modules_share_and_views_are_saved(tmp_path):
    def tied() -> nn.Sequential:
        first = nn.Linear(3, 3)
        first.bias = nn.Parameter(torch.rand(6)[:3])
        return nn.Sequential(first, nn.ReLU(), first)

    model, other = tied(), tied()
    save_weights(model, tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    assert_same_weights(other, model)
    assert other[0] is other[2]


def test_a_table_with_missing_values(tmp_path):
    write_table(tmp_path / "t.csv", [{"a": 1, "b": 0.123456789}, {"a": 2, "c": 1e-9}])
    assert (tmp_path / "t.csv").read_text() == "a,b,c\n1,0.123457,\n2,,1e-09\n"


def test_summaries_of_another_kind_are_refused(tmp_path):
    for name, text in (("a", "{"), ("b", '{"schema": "x"}'), ("c", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}\b"):
            Summary.load(tmp_path / name)
