"""The zoo is what it says: liars hide what their nets lose, honest models work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from zoo import ENTRIES, LIARS, NETS, THREAT, Entry, Zoo, data

import advbench
from advbench.attacks.apgd import APGD
from advbench.cli.main import main
from advbench.errors import UserError
from advbench.evaluation.protocols import APGDProtocol
from advbench.runs.results import Results

N = 24
WHITE_BOX = APGDProtocol(steps=10)


@pytest.fixture
def zoo(once: Callable[[str, Callable[[], None]], Path]) -> Zoo:
    return Zoo(once, epochs=3)


@pytest.fixture(scope="session")
def transferred(once: Callable[[str, Callable[[], None]], Path]) -> Tensor:
    """Images that break the undefended net, from which liars are made."""
    net, (x, y) = Zoo(once, epochs=3).net("standard", 0), ENTRIES["standard"].test
    return advbench.attack(net, x[:N], y[:N], THREAT, APGD(steps=20, loss_name="margin"))


def named(*kinds: str) -> list[Entry]:
    return [entry for entry in ENTRIES.values() if entry.kind in kinds]


def test_the_zoo_is_large_enough() -> None:
    assert len(named("too_high", "hides_but_right")) >= 22 and len(named("honest")) == 12
    assert set(LIARS.TRICKS) <= set(ENTRIES)


@pytest.mark.parametrize("entry", named("too_high", "hides_but_right"), ids=lambda e: e.name)
def test_a_liar_keeps_its_accuracy_and_hides_what_breaks_it(
    entry: Entry, zoo: Zoo, transferred: Tensor
) -> None:
    model, (x, y) = entry.build(zoo, 0), entry.test
    x, y = x[:N], y[:N]
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() > 0.7
    if entry.refused:
        with pytest.raises(UserError):
            advbench.evaluate(model, x, y, threat=THREAT, protocol=WHITE_BOX, traits=entry.traits)
        return
    if entry.kind == "hides_but_right":
        return
    assert entry.net == "standard"
    reported = advbench.evaluate(model, x, y, threat=THREAT, protocol=WHITE_BOX).robust.acc
    with torch.no_grad():
        left = (model(transferred).argmax(1) == y).float().mean()
    assert reported > left + 0.25


@pytest.mark.parametrize("name", ["standard", "two_classes"])
def test_an_honest_model_learns(name: str, zoo: Zoo) -> None:
    model, (x, y) = ENTRIES[name].build(zoo, 0), ENTRIES[name].test
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_every_honest_net_fits_its_data() -> None:
    for name, how in NETS.items():
        (x, y), model = ENTRIES[name].test, how.build(0)
        with torch.no_grad():
            assert model.eval()(x[:4]).shape == (4, data(how.classes).info.num_classes), name
        assert len(x) >= 70 and y.max() < how.classes


def test_a_liar_is_evaluated_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["eval", f"model={LIARS.__file__}:HardLabels", "data=digits", "threat=linf_015"]
    assert main([*command, "protocol=pgd", "protocol.steps=3", "n=12", "hydra.run.dir=run"]) == 0
    results = Results.load(tmp_path / "run" / "results.json")
    assert (results.robust.acc or 0) > 0.9 and results.run == "liars"


def test_the_page_names_every_trick() -> None:
    page = Path(LIARS.__file__).with_suffix(".md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)`", page)) >= set(LIARS.TRICKS)
