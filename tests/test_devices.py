"""Devices that are not there are the user's mistake, whoever asks for them."""

from __future__ import annotations

import pytest
import torch

from advbench import devices
from advbench.devices import asking_for, emulates_bf16
from advbench.errors import UserError
from advbench.evaluation.resources import Resources


def test_what_fabric_refuses_is_said_in_one_line() -> None:
    with pytest.raises(UserError) as caught, asking_for("cuda", "0,7"):
        raise RuntimeError("no such\n  device " + 300 * "x")
    assert str(caught.value).startswith(
        "trainer.accelerator=cuda with trainer.devices=0,7 is not available here: no such device xx"
    )
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 280


@pytest.mark.parametrize(("devices", "nodes"), [(0, 1), (-1, 1), (9999, 1), ("9999", 1), (1, 2)])
def test_what_fabric_would_do_without_a_word_is_refused(devices: int | str, nodes: int) -> None:
    with pytest.raises(UserError), asking_for("cpu", devices, nodes):
        pytest.fail("Fabric was asked")


def test_a_launcher_knows_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "20000")
    with asking_for("cpu", 10_000, 2):
        pass


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), asking_for("cpu", 1):
        raise KeyError("ours")


def test_an_evaluation_asks_for_devices() -> None:
    with pytest.raises(UserError, match=r"trainer\.devices=many is not available here: \S+"):
        Resources(accelerator="cpu", devices="many").launch()


@pytest.mark.parametrize(
    ("key", "flags", "emulated"),
    [
        ("flags", "fpu avx512f avx512_vnni", True),
        ("flags", "fpu avx512_bf16 amx_bf16", False),
        ("Features", "fp asimd", True),
        ("Features", "fp asimd bf16", False),
        ("nothing", "", True),
    ],
)
def test_processors_say_whether_they_multiply_bfloat16(
    monkeypatch: pytest.MonkeyPatch, key: str, flags: str, emulated: bool
) -> None:
    monkeypatch.setattr(devices, "processors", lambda asked: [flags, flags] * (asked == key))
    assert emulates_bf16(torch.device("cpu")) == emulated
    assert not emulates_bf16(torch.device("mps"))
