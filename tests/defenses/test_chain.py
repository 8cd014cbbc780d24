"""Several defenses on one model; and a defense of somebody's own, from a file, end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from small import THREAT, fit, net, splits
from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.backbones.convnet import convnet
from advbench.cli.main import main
from advbench.config import build, import_file, options, shipped
from advbench.defenses.base import Defense, Part, PartName, Step, Surrogate, Traits
from advbench.defenses.chain import Chain
from advbench.defenses.hpm import HPM, HPMHead
from advbench.defenses.jumprelu import JumpReLU
from advbench.defenses.mfdv_snn import MFDVSNN, VarianceHead
from advbench.defenses.sparta import Sparta, SpatialGate
from advbench.errors import UserError
from advbench.evaluation.adaptive import MSAProtocol
from advbench.evaluation.protocol import Subject
from advbench.experiments.checkpoints import load_weights
from advbench.recipes.pgd_at import PGDAT
from advbench.runs.fingerprint import model_sha256
from advbench.runs.results import Results
from advbench.training.trainer import Trainer


@dataclass(frozen=True)
class First(Defense):
    """Notes which of its hooks are called, and gives back what it was made with."""

    log: list[str] = field(default_factory=list)
    wants: tuple[PartName, ...] = ()
    terms: Mapping[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    own: Traits = field(default_factory=Traits)
    weights: str | None = None

    def note(self, hook: str) -> None:
        self.log.append(f"{type(self).__name__} {hook}")

    def traits(self, model: nn.Module) -> Traits:
        return self.own

    def apply(self, model: Classifier) -> Classifier:
        self.note("apply")
        return model

    def prepare(self, model: Classifier, data: Any) -> None:
        self.note("prepare")

    @property
    def parts(self) -> tuple[PartName, ...]:
        return self.wants

    def before_part(self, model: Any, part: PartName) -> None:
        self.note(f"before {part}")

    def loss_terms(self, model: Any, step: Step) -> dict[str, Tensor]:
        self.note("terms")
        return {name: torch.tensor(value) for name, value in self.terms.items()}

    def after_step(self, model: Any, step: Step) -> None:
        self.note("step")

    def after_epoch(self, model: Any, data: Any) -> None:
        self.note("epoch")

    def adopt(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        self.note(f"adopt {sorted(weights)}")

    def surrogates(self, model: Any) -> Mapping[str, Surrogate]:
        return {
            name: Surrogate(model, exact=True, loss="ce", why=f"{type(self).__name__} {name}")
            for name in self.names
        }


class Second(First):
    pass


class Third(First):
    pass


def step_of(model: Classifier, x: Tensor) -> Step:
    h = model.features(x)
    y = torch.zeros(len(x), dtype=torch.int64)
    return Step(y, Part(x, h, model.head(h)), None, epoch=0, step=0)


def backbone() -> Classifier:
    torch.manual_seed(0)
    return convnet(num_classes=10, input_shape=[1, 8, 8]).build()


# Hooks


def test_every_hook_runs_in_the_order_of_the_members():
    log: list[str] = []
    chain = Chain((First(log), Second(log), Third(log)))
    model = net()
    assert chain.apply(model) is model
    chain.prepare(model, splits())
    chain.before_part(model, "clean")
    chain.loss_terms(model, step_of(model, torch.rand(2, 1, 4, 4)))
    chain.after_step(model, step_of(model, torch.rand(2, 1, 4, 4)))
    chain.after_epoch(model, splits())
    hooks = ("apply", "prepare", "before clean", "terms", "step", "epoch")
    assert log == [f"{who} {hook}" for hook in hooks for who in ("First", "Second", "Third")]


@dataclass(frozen=True)
class Wrap(Defense):
    """Returns another model."""

    def apply(self, model: Classifier) -> Classifier:
        trunk = nn.Sequential(model.trunk)
        return Classifier(trunk, num_features=16, num_classes=3, input_shape=(1, 4, 4))


def test_what_one_member_returns_the_next_one_gets():
    model = net()
    applied = Chain((Wrap(), Wrap())).apply(model)
    assert applied.trunk.get_submodule("0.0") is model.trunk


def test_training_calls_all_hooks_of_all_members(tmp_path):
    log: list[str] = []
    members = (
        First(log, terms={"first": 1.0}),
        Second(log, terms={"second": 2.0}, wants=("clean",)),
    )
    trainer = Trainer(epochs=1, batch_size=48, val_steps=1)
    fit(tmp_path, trainer, defense=Chain(members), recipe=PGDAT(threat=THREAT, steps=1))
    step = ["before adversarial", "before clean", "terms", "step"]
    assert log == [
        f"{who} {hook}"
        for hook in ("prepare", *step, *step, "epoch")
        for who in ("First", "Second")
    ]
    header, values = (tmp_path / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), map(float, values.split(",")), strict=True))
    assert (row["loss_first"], row["loss_second"]) == (1, 2)


def test_parts_are_the_union():
    def parts(*wants: tuple[PartName, ...]) -> tuple[PartName, ...]:
        return Chain(tuple(First(wants=want) for want in wants)).parts

    assert parts((), ()) == ()
    assert parts((), ("clean",)) == parts(("clean",), ("clean",)) == ("clean",)
    assert parts(("clean",), ("adversarial", "clean")) == ("clean", "adversarial")


def test_terms_of_one_name_are_refused():
    model = net()
    step = step_of(model, torch.rand(2, 1, 4, 4))
    chain = Chain((First(terms={"a": 1.0}), Second(terms={"b": 2.0}), Third(terms={"c": 3.0})))
    assert {k: float(v) for k, v in chain.loss_terms(model, step).items()} == {
        "a": 1, "b": 2, "c": 3
    }  # fmt: skip
    chain = Chain((First(terms={"a": 1.0}), Second(terms={"b": 2.0}), Third(terms={"b": 2.0})))
    with pytest.raises(ValueError, match="Second and Third both have a loss term 'b'"):
        chain.loss_terms(model, step)


# Traits


def merged(*traits: Traits) -> Traits:
    return Chain(tuple(First(own=own) for own in traits)).traits(net())


def test_traits_are_the_worst_of_all():
    retrofit, batches = Traits(retrofit=True), Traits(batch_dependent=True, batch_size=32)
    table = [
        ((Traits(), Traits()), Traits()),
        ((Traits(stochastic=True), Traits()), Traits(stochastic=True)),
        ((Traits(), Traits(output="probabilities")), Traits(output="probabilities")),
        ((retrofit, retrofit), retrofit),
        ((retrofit, Traits()), Traits()),
        ((batches, Traits()), batches),
        ((Traits(), batches), batches),
        ((batches, batches), batches),
        ((Traits(batch_dependent=True), batches), batches),
        # A size means nothing to a member that does not look at the batch.
        ((Traits(batch_size=5), batches), batches),
        ((Traits(batch_size=5), Traits()), Traits()),
        (
            (replace(retrofit, stochastic=True), replace(batches, gradient="none"), Traits()),
            replace(batches, stochastic=True, gradient="none"),
        ),
    ]
    for members, expected in table:
        assert merged(*members) == expected
    assert len(table) == 12


def test_the_worst_gradient_counts():
    order = ("exact", "straight_through", "discontinuous", "none")
    seen = 0
    for i, one in enumerate(order):
        for j, other in enumerate(order):
            got = merged(Traits(gradient=one), Traits(gradient=other)).gradient
            assert got == order[max(i, j)]
            seen += 1
    assert seen == 16


def test_batches_of_two_sizes_are_refused_before_training():
    sizes = [Traits(batch_dependent=True, batch_size=size) for size in (64, 32, 64)]
    chain = Chain(tuple(First(own=own) for own in sizes))
    message = "judged in batches of 32 and of 64 rows: give them one size"
    for act in (chain.traits, chain.apply):
        with pytest.raises(UserError, match=message):
            act(net())


# Surrogates


def test_surrogates_of_one_name_are_named_by_their_member():
    model = net()
    chain = Chain((First(names=("a", "base")), Second(names=("base", "b")), Third(names=("c",))))
    found = chain.surrogates(model)
    assert {name: surrogate.why for name, surrogate in found.items()} == {
        "a": "First a",
        "first.base": "First base",
        "second.base": "Second base",
        "b": "Second b",
        "c": "Third c",
    }
    assert all(surrogate.exact for surrogate in found.values())


def test_a_class_that_comes_twice_is_named_by_its_place():
    chain = Chain((First(names=("a",)), Second(names=("a",)), First(names=("a", "b"))))
    assert list(chain.surrogates(net())) == ["first1.a", "second.a", "first3.a", "b"]


# Weights of another run


def test_weights_go_to_the_member_that_takes_some():
    log: list[str] = []
    chain = Chain((First(log), Second(log, weights="outputs/train/a"), MFDVSNN()))
    assert chain.weights == "outputs/train/a"
    chain.adopt(net(), {"phi": torch.zeros(1)})
    assert log == ["Second adopt ['phi']"]
    around = Chain((chain, Third(log)))
    assert around.weights == "outputs/train/a"
    around.adopt(net(), {"phi": torch.zeros(1)})
    assert log == ["Second adopt ['phi']"] * 2


def test_weights_that_nobody_or_two_take_are_refused():
    chain = Chain((First(), MFDVSNN()))
    assert chain.weights is None
    with pytest.raises(UserError, match="Chain takes no weights from another run"):
        chain.adopt(net(), {})
    with pytest.raises(
        UserError, match="First and Second take weights from another run, and one member may"
    ):
        Chain((First(weights="a"), Third(), Second(weights="a")))


def test_sparta_in_a_chain_takes_its_phi():
    donor = Sparta(share="net").apply(backbone())
    for parameter in donor.parameters():
        nn.init.constant_(parameter, 0.25)
    chain = Chain((Sparta(share="net", weights="RUN"), MFDVSNN()))
    model = chain.apply(backbone())
    head = model.head.state_dict()["mu.weight"].clone()
    chain.adopt(model, donor.state_dict())
    phis = [value for name, value in model.state_dict().items() if ".phi." in name]
    assert phis and all((phi == 0.25).all() for phi in phis)
    assert torch.equal(model.head.state_dict()["mu.weight"], head)


# Real members

PAIRS = {
    "sparta and mfdv_snn": (Chain((Sparta(), MFDVSNN())), SpatialGate, VarianceHead),
    "sparta and hpm": (Chain((Sparta(), HPM(eval_batch=16))), SpatialGate, HPMHead),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_an_activation_inside_and_a_head_on_top(name, tmp_path):
    assert len(PAIRS) == 2
    chain, inside, top = PAIRS[name]
    model = chain.apply(net())
    assert isinstance(model.head, top) and any(isinstance(m, inside) for m in model.modules())
    trainer = Trainer(epochs=1, batch_size=48, val_steps=1)
    recipe = PGDAT(threat=THREAT, steps=2)
    assert fit(tmp_path, trainer, model=model, recipe=recipe, defense=chain).steps == 2
    other = chain.apply(net())
    load_weights(other, tmp_path / "last.safetensors")
    assert model_sha256(other.eval()) == model_sha256(model.eval())

    alone = [member.surrogates(model) for member in chain.members]
    found = chain.surrogates(model)
    assert list(found) == [name for names in alone for name in names] and all(alone)
    assert model_sha256(model) == model_sha256(other), "surrogates leave the model alone"
    assert chain.traits(model) == chain.members[1].traits(model), "Sparta adds nothing"


def test_the_mean_network_keeps_what_is_inside():
    chain = Chain((JumpReLU(jump=0.01), MFDVSNN()))
    model = chain.apply(backbone()).eval()
    assert chain.traits(model) == Traits(stochastic=True, gradient="discontinuous")
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    head, h = model.head, model.features(x)
    assert isinstance(head, VarianceHead)
    found = chain.surrogates(model)
    assert torch.equal(found["mean"].model(x), head.classifier(head.mu(h)))
    double = found["double"].model
    assert isinstance(double, Classifier)
    assert not torch.equal(double.features(x), h), "another jump inside"
    assert not torch.equal(double(x), double(x)), "and still the noise on top"


def test_two_heads_are_refused_by_the_second():
    table = [
        ((MFDVSNN(), MFDVSNN()), "MFDV-SNN replaces a linear head and this one is VarianceHead"),
        ((HPM(), MFDVSNN()), "MFDV-SNN replaces a linear head and this one is HPMHead"),
        ((MFDVSNN(), HPM()), "head of the model is VarianceHead, and HPM needs a linear head"),
    ]
    for members, message in table:
        with pytest.raises(UserError, match=message):
            Chain(members).apply(net())
    assert len(table) == 3


# The config


def test_a_chain_has_at_least_two_members():
    for members in ((), (MFDVSNN(),)):
        with pytest.raises(UserError, match=rf"not {len(members)}: give defense.members=\[sparta,"):
            Chain(members)
    chain: Any = Chain([First(), MFDVSNN()])  # pyright: ignore[reportArgumentType]  (as configs do)
    assert isinstance(chain.members, tuple) and len(chain.members) == 2


def test_the_config_names_every_field_and_chooses_nobody():
    text = options("defense")["chain"].read_text()
    node = OmegaConf.create(text)
    assert node.keys() - {"_target_"} == {f.name for f in fields(Chain)}
    assert text.startswith("# advbench train defense=chain defense.members=[sparta,hpm]\n# ")
    with pytest.raises(UserError, match="at least two members, not 0"):
        build(shipped("defense", "chain"), "defense")


# A defense from a file, as the README says it

KWTA = '''\
"""k winners take all (Xiao et al. 2020, arXiv 1905.10510): only the largest values stay."""

from dataclasses import dataclass

from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.defenses.base import Defense, Traits
from advbench.surgery import replace_modules


class Winners(nn.Module):
    """Keeps the largest values of each map (H, W), a share of ``ratio`` and at least one."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, z: Tensor) -> Tensor:
        rows = z.flatten(2)
        k = max(1, int(self.ratio * rows.shape[2]))
        last = rows.topk(k, dim=2).values[:, :, -1:]
        return (rows * (rows >= last)).view_as(z)


@dataclass(frozen=True)
class KWTA(Defense):
    ratio: float = 0.5

    def traits(self, model: nn.Module) -> Traits:
        return Traits(gradient="discontinuous")

    def apply(self, model: Classifier) -> Classifier:
        replace_modules(model, nn.ReLU, lambda old, name: Winners(self.ratio))
        return model
'''
KWTA_YAML = """\
# advbench train defense=kwta
# k winners take all in the place of every ReLU.
_target_: kwta_of_mine.KWTA
ratio: 0.5
"""


def test_a_defense_from_a_file_is_trained_and_attacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the folder of a plugin is put on it
    Path("kwta_of_mine.py").write_text(KWTA)
    Path("conf/defense").mkdir(parents=True)
    Path("conf/defense/kwta.yaml").write_text(KWTA_YAML)
    plugins = "plugins=[kwta_of_mine.py]"
    train = ["train", "--config-dir", "conf", "defense=kwta", "defense.ratio=0.25", plugins]
    fast = ["recipe=standard", "trainer.epochs=3", "trainer.val_steps=1", "hydra.run.dir=run"]
    assert main([*train, *fast]) == 0
    assert main(["eval", "run=run", "protocol=fgsm", "n=20", plugins]) == 0
    (file,) = tmp_path.glob("outputs/eval/*/results.json")
    results = Results.load(file)
    assert results.data["n"] == 20 and results.clean.acc > 0.5
    assert results.robust.acc < results.clean.acc
    plan = json.loads((file.parent / "plan.json").read_text())
    assert plan["identity"]["traits"]["gradient"] == "discontinuous"
    assert "ratio: 0.25" in Path("run/config.yaml").read_text()
    capsys.readouterr()
    assert main(["eval", "run=run", "protocol=fgsm", "n=20"]) == 2
    assert "plugins=[FILE.py]" in capsys.readouterr().err, "a run cannot name code by itself"


def test_winners_are_the_largest_of_each_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "winners_of_mine.py").write_text(KWTA)
    plugin = import_file(str(tmp_path / "winners_of_mine.py"))
    z = torch.tensor([[[[3.0, -1.0], [2.0, 0.5]], [[-4.0, -3.0], [-2.0, -1.0]]]])
    z.requires_grad_()
    out = plugin.Winners(0.5)(z)
    wanted = [[[[3.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [-2.0, -1.0]]]]
    assert out.tolist() == wanted
    (gradient,) = torch.autograd.grad(out.sum(), z)
    assert torch.equal(gradient, (torch.tensor(wanted) != 0).float())


def test_the_noise_of_another_member_stays_in_a_surrogate() -> None:
    chain = Chain(members=(JumpReLU(jump=0.1), MFDVSNN(features=4)))
    found = chain.surrogates(chain.apply(backbone()).eval())
    assert found["double"].stochastic and not found["mean"].stochastic
    plan = MSAProtocol().plan(Subject(Traits(stochastic=True), 10, THREAT, surrogates=found))
    draws = {stage.name: stage.eot_samples for stage in plan}
    assert draws["apgd-ce@double"] == 20 and draws["apgd-margin@mean"] == 1
