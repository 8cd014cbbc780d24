"""Checkpoints as people have them are loaded whole, or refused with what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from odd_checkpoints import LOADED, REFUSED, prefixed, state
from odd_models import plain
from safetensors.torch import save_file
from torch import nn

from advbench.errors import UserError
from advbench.experiments.checkpoints import load_checkpoint, load_weights


def assert_loaded(model: nn.Module, atol: float = 0.0) -> None:
    own, wanted = model.state_dict(), state()
    for key in (key for key in own if "num_batches" not in key):
        torch.testing.assert_close(own[key], wanted[key], rtol=0, atol=atol)


@pytest.mark.parametrize("name", LOADED)
def test_it_is_loaded_and_said(name: str, tmp_path: Path) -> None:
    content, told = LOADED[name]
    torch.save(content(), tmp_path / "w.pt")
    model = plain()
    notices = load_checkpoint(model, str(tmp_path / "w.pt"))
    assert_loaded(model, 1e-3 if name == "half" else 0.0)
    assert told in " ".join(notices) and bool(notices) == bool(told)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_the_model_left_alone(name: str, tmp_path: Path) -> None:
    content, told = REFUSED[name]
    torch.save(content(), tmp_path / "w.pt")
    model = plain()
    with pytest.raises(UserError, match=told) as refusal:
        load_checkpoint(model, str(tmp_path / "w.pt"))
    assert "\n" not in str(refusal.value)
    before = plain().state_dict()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_tables_are_whole() -> None:
    assert len(LOADED) + len(REFUSED) >= 20


def test_one_of_several_sets_is_chosen_by_name(tmp_path: Path) -> None:
    torch.save({"model": plain().state_dict(), "ema": prefixed("module.")}, tmp_path / "w.pt")
    model = plain()
    assert "from 'ema'" in load_checkpoint(model, f"{tmp_path}/w.pt:ema")[0]
    assert_loaded(model)
    with pytest.raises(
        UserError, match=r"no weights 'emma' that fit; there are: model, ema.module"
    ):
        load_checkpoint(model, f"{tmp_path}/w.pt:emma")


def test_names_that_match_as_they_are_win(tmp_path: Path) -> None:
    """A net whose own names begin with ``module.`` is no wrapped one."""
    net = nn.ModuleDict({"module": plain()})
    torch.save(prefixed("module."), tmp_path / "w.pt")
    assert load_checkpoint(net, str(tmp_path / "w.pt")) == []
    assert_loaded(net["module"])


def test_a_wrapped_model_takes_bare_weights(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    net = nn.DataParallel(plain())
    assert "'module.' put before" in load_checkpoint(net, str(tmp_path / "w.safetensors"))[0]
    assert_loaded(net.module)


def test_a_run_takes_nothing_but_its_own(tmp_path: Path) -> None:
    torch.save(prefixed("module."), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"9 missing.*9 unknown"):
        load_weights(plain(), tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_file_names_the_cure(tmp_path: Path) -> None:
    torch.jit.script(plain()).save(tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"torch\.jit\.load"):
        load_checkpoint(plain(), str(tmp_path / "w.pt"))


class Code:
    """Something that is no tensor."""


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": state(), "args": Code()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="loading it would run code"):
        load_checkpoint(plain(), str(tmp_path / "w.pt"))
