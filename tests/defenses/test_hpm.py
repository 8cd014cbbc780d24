"""HPM against prototypes, distances and gradients worked out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from processes import run_script
from small import Stripes, assert_same_result, fit, net, splits
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from advbench.backbones.base import Classifier
from advbench.cli.main import main
from advbench.config import build, options
from advbench.data.augment import Augment
from advbench.data.base import ArraySplit, Splits
from advbench.defenses.base import Defense, Part, Step, Traits
from advbench.defenses.hpm import CONTEXT_SEED, HPM, HPMHead, head_of
from advbench.errors import UserError
from advbench.experiments.checkpoints import load_weights, read_weights
from advbench.recipes.standard import Standard
from advbench.training.checkpoint import save_weights
from advbench.training.optimizers import SGD
from advbench.training.trainer import Trainer

K, D = 4, 6


def bare(features: int = D, classes: int = K) -> Classifier:
    """Images (1, 1, D) that are their own features."""
    torch.manual_seed(0)
    return Classifier(
        nn.Flatten(), num_features=features, num_classes=classes, input_shape=(1, 1, features)
    )


def defended(hpm: HPM) -> Classifier:
    """With prototypes, a context and a temperature; nobody is put in class 3."""
    model = hpm.apply(bare())
    head = head_of(model)
    generator = torch.Generator().manual_seed(1)
    head.prototypes.copy_(torch.randn(K, D, generator=generator))
    head.context.copy_(torch.randn(head.context.shape, generator=generator))
    head.linear.weight.data = 2 * torch.randn(K, D, generator=generator)
    head.linear.bias.data[3] = -1e3
    head.log_temperature.data.fill_(math.log(3))
    return model.eval()


def images(rows: int, seed: int = 2) -> Tensor:
    return torch.randn(rows, 1, 1, D, generator=torch.Generator().manual_seed(seed))


def hard_logits(model: Classifier, h: Tensor, rows: Tensor, mix: float) -> Tensor:
    """Logits of ``h`` by prototypes from ``rows``, (N, D), with loops as in the definition."""
    head = head_of(model)
    points = []
    predicted = head.linear(rows).argmax(1)
    for k, prototype in enumerate(head.prototypes):
        mine = rows[predicted == k]
        points.append(mix * prototype + (1 - mix) * (mine.mean(0) if len(mine) else prototype))
    squares = [[(row - point).square().sum() for point in points] for row in h]
    return -torch.tensor(squares) / head.log_temperature.exp().item()


# The head


def test_batch_prototypes_by_hand():
    hpm = HPM(mix=0.25)
    model = hpm.apply(bare(features=2, classes=3)).eval()
    head = head_of(model)
    head.linear.weight.data = torch.tensor([[1.0, 0], [0, 1], [-9, -9]])
    head.linear.bias.data.zero_()
    head.prototypes.copy_(torch.tensor([[7.0, 0.5], [0, -1], [1, 1]]))
    head.log_temperature.data.fill_(math.log(2))
    x = torch.tensor([[2.0, 0], [4, 1], [0, 3]]).view(3, 1, 1, 2)
    # Rows 0 and 1 are put in class 0, row 2 in class 1, nobody in class 2: P = D / 4 + 3 B / 4
    # with B = (3, 0.5), (0, 3), (1, 1), so P = (4, 0.5), (0, 2), (1, 1).
    wanted = -torch.tensor([[4.25, 8, 2], [0.25, 17, 9], [22.25, 1, 5]]) / 2
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model.train()(x), wanted)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_batch_logits_are_distances_to_mixed_prototypes(mix):
    model, x = defended(HPM(mix=mix)), images(9)
    predicted = head_of(model).linear(x.flatten(1)).argmax(1)
    assert set(predicted.tolist()) == {0, 1, 2}, "one class is empty"
    torch.testing.assert_close(model(x), hard_logits(model, x.flatten(1), x.flatten(1), mix))


def test_without_mixing_it_is_a_linear_head():
    for inference in ("batch", "context"):
        model, x = defended(HPM(mix=1.0, inference=inference)), images(9)
        points = head_of(model).prototypes
        linear = F.linear(x.flatten(1), 2 * points / 3, -points.square().sum(1) / 3)
        torch.testing.assert_close(model(x).log_softmax(1), linear.log_softmax(1))


def straight_through(model: Classifier, x: Tensor, v: Tensor, mix: float, tau: float) -> list:
    """Gradients of sum v * logits in x and W by the chain rule, at the hard prototypes.

    The derivative of q is that of s; n and the choice of classes are constants.
    """
    head = head_of(model)
    weight, bias = head.linear.weight, head.linear.bias
    context = head.inference == "context" and not model.training
    h = x.flatten(1)
    s = (F.linear(h, weight, bias) / tau).softmax(1)
    o = F.one_hot(s.argmax(1), K).float()
    fixed, n = torch.zeros(1, K, D), o.sum(0).expand(len(h), K)
    if context:
        theirs = F.one_hot(head.linear(head.context).argmax(1), K).float()
        fixed, n = theirs.T @ head.context, theirs.sum(0) + o
    points, slopes = [], []
    for i in range(len(h)):
        rows = slice(i, i + 1) if context else slice(None)
        own, value = h[rows], h[rows].detach()
        n_i = n[i][:, None]
        B = (fixed + o[rows].T @ value) / n_i.clamp(min=1)
        B = torch.where(n_i > 0, B, head.prototypes)
        points.append((mix * head.prototypes + (1 - mix) * B).detach().squeeze(0))
        moving = (o[rows].T @ own + s[rows].T @ value) / n_i.clamp(min=1)
        slopes.append((1 - mix) * moving * (n_i > 0))
    P, slope = torch.stack(points), torch.stack(slopes)
    pull = 2 * v[:, :, None] * (h.detach()[:, None] - P) / head.log_temperature.exp().item()
    linearised = (pull * slope).sum() - (pull * h[:, None]).sum()
    return list(torch.autograd.grad(linearised, [x, weight]))


@pytest.mark.parametrize("inference", ["batch", "context"])
@pytest.mark.parametrize(("mix", "tau"), [(0.0, 1.0), (0.6, 2.5)])
def test_straight_through_has_hard_values_and_soft_gradients(inference, mix, tau):
    model = defended(HPM(mix=mix, tau=tau, inference=inference, eval_batch=3))
    x, v = images(7).requires_grad_(), torch.randn(7, K)
    logits = model(x)
    weight = head_of(model).linear.weight
    found = torch.autograd.grad((v * logits).sum(), [x, weight])
    for one, other in zip(found, straight_through(model, x, v, mix, tau), strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_class_that_nobody_predicts_pulls_no_router():
    for inference in ("batch", "context"):
        model = defended(HPM(inference=inference, eval_batch=3))
        head = head_of(model)
        head.linear.bias.data[3] = -30.0  # s is tiny and not zero
        head.tau = 20.0
        x = images(9)
        own, other = (
            torch.autograd.grad(model(x)[:, k].sum(), head.linear.weight)[0].abs().max()
            for k in (3, 0)
        )
        assert own == 0 and other > 0.01


def test_context_adds_the_row_to_the_stored_batch():
    model = defended(HPM(mix=0.3, inference="context", eval_batch=5))
    head, x = head_of(model), images(9)
    h = x.flatten(1)
    predicted = head.linear(head.context).argmax(1)
    rows = head.linear(h).argmax(1)
    assert len(set(predicted.tolist())) == 2 and set(rows.tolist()) - set(predicted.tolist())
    wanted = [hard_logits(model, row[None], torch.cat([head.context, row[None]]), 0.3) for row in h]
    torch.testing.assert_close(model(x), torch.cat(wanted))


@torch.no_grad()
def test_what_depends_on_the_batch_is_what_the_traits_say():
    seen = []
    for inference in ("batch", "context"):
        for mix in (0.5, 1.0):
            hpm = HPM(mix=mix, inference=inference, eval_batch=5)
            model, x = defended(hpm), images(8)
            logits = model(x)
            others = model(torch.cat([x[:4], images(4, seed=3)]))
            alone = torch.cat([model(row) for row in x.split(1)])
            for gap in (others[:4] - logits[:4], alone - logits):
                assert (float(gap.abs().max()) > 1e-4) == hpm.traits(model).batch_dependent
            seen.append(hpm.traits(model).batch_dependent)
    assert seen == [True, False, False, False]


def test_traits():
    model = bare()
    table = {
        HPM(mix=1.0): Traits(),
        HPM(mix=1.0, inference="context"): Traits(),
        HPM(eval_batch=7): Traits(
            gradient="straight_through", batch_dependent=True, batch_size=7
        ),
        HPM(inference="context"): Traits(gradient="straight_through"),
    }  # fmt: skip
    assert len(table) == 4
    for hpm, traits in table.items():
        assert hpm.traits(model) == traits


def test_training_always_takes_prototypes_from_the_batch():
    model, x = defended(HPM(inference="context", eval_batch=5)), images(9)
    h = x.flatten(1)
    assert not torch.allclose(model(x), hard_logits(model, h, h, 0.5))
    torch.testing.assert_close(model.train()(x), hard_logits(model, h, h, 0.5))


def test_logits_are_float32_under_autocast():
    for hpm in (HPM(), HPM(inference="context"), HPM(mix=1.0)):
        model, x = defended(hpm), images(9)
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        assert logits.dtype == torch.float32 and torch.equal(logits, wanted)


def test_distances_keep_their_digits_far_from_the_origin():
    model, x = defended(HPM()), images(9).double()
    head = head_of(model)
    near = model(x.float())
    head.linear.bias.data -= 300 * head.linear.weight.data.sum(1)
    head.prototypes += 300
    torch.testing.assert_close(model((x + 300).float()), near, rtol=1e-3, atol=1e-3)


def test_the_model_can_be_traced_and_copied():
    for hpm in (HPM(), HPM(inference="context"), HPM(mix=1.0)):
        model, x = defended(hpm), images(9)
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))
        other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore
        assert torch.equal(other(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_a_strict_round_trip(tmp_path):
    for inference in ("batch", "context"):
        hpm = HPM(inference=inference, eval_batch=5)
        model, x = defended(hpm), images(9)
        save_weights(model, tmp_path / "model.safetensors")
        other = hpm.apply(bare())
        load_weights(other, tmp_path / "model.safetensors")
        assert torch.equal(other.eval()(x), model(x))
    with pytest.raises(UserError, match=r"'head.context' is \(5, 6\) and should be \(8, 6\)"):
        load_weights(HPM(eval_batch=8).apply(bare()), tmp_path / "model.safetensors")


# The hooks


def few(labels: list[int], x: Tensor | None = None, val: int = 1) -> Splits:
    """A training set of these labels, less ``val`` of them."""

    class Few(Stripes):
        @property
        def shape(self) -> tuple[int, int, int]:
            return 1, 1, D

        def open(self, part: str) -> ArraySplit:
            assert part == "train"
            y = torch.tensor(labels)
            return ArraySplit(images(len(y)).sigmoid() if x is None else x, y)

    return Splits(Few(), val=val, split_seed=0, mean=[0], std=[1], augment=Augment())


def test_prepare_takes_means_median_and_context():
    hpm, data = HPM(eval_batch=30), few([0, 1, 2, 3] * 6)
    model = hpm.apply(bare()).eval()
    hpm.prepare(model, data)
    head, train = head_of(model), data.train
    x, y = train.fetch(torch.arange(len(train)), "cpu")
    h = x.flatten(1)
    means = torch.stack([h[y == k].mean(0) for k in range(K)])
    torch.testing.assert_close(head.prototypes, means)
    nearest = torch.stack([(row - means).square().sum(1).min() for row in h])
    assert len(train) == 23
    torch.testing.assert_close(head.log_temperature.exp(), nearest.sort().values[11])
    # 23 images fill a context of 30: some are there twice.
    order = torch.randperm(23, generator=torch.Generator().manual_seed(CONTEXT_SEED))
    assert torch.equal(head.context, h[torch.cat([order, order[:7]])])


def test_the_first_temperature_looks_at_evenly_spaced_samples(monkeypatch):
    monkeypatch.setattr("advbench.defenses.hpm.MEDIAN_SAMPLES", 8)
    monkeypatch.setattr("advbench.defenses.hpm.READ", 5)
    hpm, data = HPM(eval_batch=7), few([0, 1, 2, 3] * 6)
    model = hpm.apply(bare()).eval()
    hpm.prepare(model, data)
    head = head_of(model)
    x, y = data.train.fetch(torch.arange(23), "cpu")
    h = x.flatten(1)
    means = torch.stack([h[y == k].mean(0) for k in range(K)])
    torch.testing.assert_close(head.prototypes, means)
    nearest = (h[::3, None] - means).square().sum(2).amin(1)
    torch.testing.assert_close(head.log_temperature.exp(), nearest.median())


def test_fine_tuning_goes_on_with_what_a_run_with_the_same_defense_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["defense=hpm", "recipe=standard", "trainer.epochs=1", "trainer.val_steps=1"]
    common += ["trainer.batch_size=400", "defense.momentum=1"]
    still = ["optimizer.lr=1e-12", "init_from=first"]
    assert main(["train", "hydra.run.dir=first", *common]) == 0
    assert main(["train", "hydra.run.dir=again", *common, *still]) == 0
    first, again = (
        read_weights(tmp_path / name / "model.safetensors") for name in ("first", "again")
    )
    for name in ("head.prototypes", "head.log_temperature", "head.linear.weight"):
        torch.testing.assert_close(again[name], first[name], rtol=0, atol=1e-6)


def test_no_batch_of_a_single_image_goes_through_batch_norm(monkeypatch):
    monkeypatch.setattr("advbench.defenses.hpm.READ", 11)
    sizes: list[int] = []
    hpm, data = HPM(eval_batch=7), few([0, 1, 2, 3] * 6)
    base = bare()
    base.trunk = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(D))
    model = hpm.apply(base).eval()
    model.trunk.register_forward_hook(lambda trunk, x, _: sizes.append(len(x[0])))
    hpm.prepare(model, data)
    assert len(data.train) == 23 and sizes[:3] == [8, 8, 7]


def test_a_class_without_samples_is_refused():
    with pytest.raises(UserError, match="class 2 has no training samples"):
        HPM().prepare(HPM().apply(bare()).eval(), few([0, 1, 3] * 6))


def test_samples_that_are_their_class_means_give_a_finite_temperature():
    x = torch.arange(K).repeat(4)[:, None, None, None].expand(-1, 1, 1, D) / K
    hpm = HPM()
    model = hpm.apply(bare()).eval()
    hpm.prepare(model, few([0, 1, 2, 3] * 4, x))
    assert head_of(model).log_temperature.isfinite()


def test_a_training_validates_in_the_batches_of_an_evaluation(tmp_path, monkeypatch):
    rows = []

    def forward(head: HPMHead, h: Tensor) -> Tensor:
        if not (head.training or torch.is_grad_enabled()):
            rows.append(len(h))
        return native(head, h)

    native = HPMHead.forward
    monkeypatch.setattr(HPMHead, "forward", forward)
    hpm = HPM(eval_batch=10)
    trainer = Trainer(epochs=1, batch_size=16, val_steps=1)
    fit(tmp_path, trainer, model=hpm.apply(net()), defense=hpm, recipe=Standard(), threat=None)
    assert rows == [10, 10, 10], "24 images, whatever the batches of the training"


def test_after_epoch_reads_the_same_images_again():
    hpm, data = HPM(eval_batch=12), splits()
    model = hpm.apply(net()).eval()
    hpm.prepare(model, data)
    head = head_of(model)
    before = head.context.clone(), head.prototypes.clone()
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.mul_(1.5)
    hpm.after_epoch(model, data)
    chosen = torch.randperm(102, generator=torch.Generator().manual_seed(CONTEXT_SEED))[:12]
    torch.testing.assert_close(head.context, model.features(data.train.fetch(chosen, "cpu")[0]))
    assert not torch.allclose(head.context, before[0])
    assert torch.equal(head.prototypes, before[1])


def record(model: Classifier, y: Tensor, **parts: Tensor) -> Step:
    seen = {name: Part(x, model.features(x), model(x)) for name, x in parts.items()}
    return Step(y, seen.get("clean"), seen.get("adversarial"), epoch=0, step=0)


def test_prototypes_follow_the_adversarial_rows():
    hpm = HPM(momentum=0.9)
    model = defended(hpm)
    before = head_of(model).prototypes.clone()
    y = torch.tensor([1, 3, 1, 1])
    clean, adversarial = images(4, seed=4), images(4, seed=5)
    for step, seen in (
        (record(model, y, clean=clean, adversarial=adversarial), adversarial),
        (record(model, y, clean=clean), clean),
    ):
        head_of(model).prototypes.copy_(before)
        hpm.after_step(model, step)
        h, after = seen.flatten(1), head_of(model).prototypes
        torch.testing.assert_close(after[1], 0.9 * before[1] + 0.1 * (h[0] + h[2] + h[3]) / 3)
        torch.testing.assert_close(after[3], 0.9 * before[3] + 0.1 * h[1])
        assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_the_router_learns_from_the_same_rows():
    hpm = HPM(fc_weight=0.5)
    model, y = defended(hpm), torch.tensor([0, 1, 2, 1])
    clean, adversarial = images(4, seed=4), images(4, seed=5)
    for step, seen in (
        (record(model, y, clean=clean, adversarial=adversarial), adversarial),
        (record(model, y, clean=clean), clean),
    ):
        log_p = head_of(model).linear(seen.flatten(1)).log_softmax(1)
        wanted = -0.5 * log_p[torch.arange(4), y].mean()
        torch.testing.assert_close(hpm.loss_terms(model, step), {"fc": wanted})


def test_nothing_in_a_step_waits_for_the_device():
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(name in str(func) for name in ("_local_scalar", "nonzero", "equal", "masked")):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    hpm, y = HPM(), torch.tensor([0, 1, 2, 1])
    model = defended(hpm).train()
    with Watch():
        step = record(model, y, adversarial=images(4))
        hpm.loss_terms(model, step)
        hpm.after_step(model, step)
    assert waits == []
    with Watch():
        float(torch.ones(1))
    assert waits, "the watch sees such a read"


# Training


@dataclass(frozen=True)
class Interrupted(HPM):
    """Stops after a step."""

    stop_at: int = -1

    def after_step(self, model: Classifier, step: Step) -> None:
        super().after_step(model, step)
        if step.step == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("hpm", "ema"), [(Interrupted(), None), (Interrupted(inference="context"), 0.9)]
)
def test_fine_tuning_learns_and_goes_on_after_an_interruption(tmp_path, hpm, ema):
    base = net()
    fit(tmp_path / "base", model=base, recipe=Standard())

    def tune(folder: Path, defense: HPM) -> tuple[Classifier, float]:
        model = defense.apply(copy.deepcopy(base))
        trainer = Trainer(epochs=2, batch_size=16, val_steps=1, save_every=0, ema=ema)
        summary = fit(folder, trainer, model=model, defense=defense, optimizer=SGD(lr=0.01))
        return model, summary.val["clean"]

    whole, accuracy = tune(tmp_path / "whole", hpm)
    assert accuracy > 0.6
    for stop_at in (2, 8):
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "parts", replace(hpm, stop_at=stop_at))
    tune(tmp_path / "parts", hpm)
    assert_same_result(tmp_path / "whole", tmp_path / "parts")

    started = hpm.apply(copy.deepcopy(base)).eval()
    hpm.prepare(started, splits())
    moved = head_of(whole).prototypes - head_of(started).prototypes
    assert (moved.norm(dim=1) > 1e-3).all()
    assert head_of(whole).log_temperature != head_of(started).log_temperature
    # What is kept has the context of its own weights.
    kept = hpm.apply(net()).eval()
    load_weights(kept, tmp_path / "whole" / "last.safetensors")
    context = head_of(kept).context.clone()
    hpm.after_epoch(kept, splits())
    torch.testing.assert_close(head_of(kept).context, context)


DEVICES = """
import sys
from pathlib import Path
from advbench.data.augment import Augment
from advbench.defenses.hpm import HPM
from advbench.recipes.pgd_at import PGDAT
from advbench.training.trainer import Trainer
import small
from small import THREAT, fit, net

devices, folder = int(sys.argv[1]), Path(sys.argv[2])
whole = small.splits
small.splits = lambda: whole(Augment())
# With batch prototypes each device would have those of its own rows.
hpm = HPM(mix=1.0, momentum=0.5, eval_batch=8)
recipe = PGDAT(threat=THREAT, steps=1, random_start=False)
trainer = Trainer(epochs=1, batch_size=16, devices=devices, accelerator="cpu", val_steps=1)
fit(folder, trainer, model=hpm.apply(net(plain=True)), recipe=recipe, defense=hpm)
"""


@pytest.mark.slow
def test_two_processes_move_the_prototypes_as_one_does(tmp_path):
    heads = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        run_script(DEVICES, str(devices), str(folder), folder=tmp_path, processes=devices)
        model = HPM(eval_batch=8).apply(net(plain=True))
        load_weights(model, folder / "last.safetensors")
        heads.append(head_of(model).state_dict())
    assert len(heads[0]) == 5
    for name, value in heads[0].items():
        torch.testing.assert_close(value, heads[1][name], rtol=1e-4, atol=1e-5)


# Surrogates


@torch.no_grad()
@pytest.mark.parametrize("inference", ["batch", "context"])
def test_surrogates_compute_what_they_say(inference):
    hpm = HPM(mix=0.3, tau=5.0, inference=inference, eval_batch=5)
    model, x = defended(hpm), images(9)
    before, h = model(x), x.flatten(1)
    head = head_of(model)
    found = hpm.surrogates(model)
    assert list(found) == ["fc_head", "static", "soft-1", "soft-0.1", "frozen_batch"]
    logits = {name: s.model(x) for name, s in found.items()}
    torch.testing.assert_close(logits["fc_head"], head.linear(h))
    torch.testing.assert_close(logits["static"], hard_logits(model, h, h, 1.0))
    torch.testing.assert_close(logits["frozen_batch"], hard_logits(model, h, head.context, 0.3))
    for tau in (1.0, 0.1):
        s = (head.linear(h) / tau).softmax(1)
        fixed, n = torch.zeros(K, D), torch.zeros(K)
        if inference == "context":
            theirs = F.one_hot(head.linear(head.context).argmax(1), K).float()
            fixed, n = theirs.T @ head.context, theirs.sum(0)
        for i in range(len(h)):
            rows = slice(i, i + 1) if inference == "context" else slice(None)
            points = []
            for k in range(K):
                mass = float(n[k] + s[rows, k].sum())
                total = fixed[k] + s[rows, k] @ h[rows]
                if mass < 1:
                    total, mass = total + (1 - mass) * head.prototypes[k], 1.0
                points.append(0.3 * head.prototypes[k] + 0.7 * total / mass)
            wanted = -(h[i] - torch.stack(points)).square().sum(1) / 3
            torch.testing.assert_close(logits[f"soft-{tau:g}"][i], wanted)

    assert torch.equal(model(x), before), "the model is as it was"
    assert hpm.surrogates(model).keys() == found.keys()
    for name, surrogate in found.items():
        assert not surrogate.exact and not surrogate.needs_clean_input and surrogate.why
        assert not surrogate.model.training
        gap = (logits[name] - before).abs().max()
        assert gap > 1e-3, name
        assert {id(p) for p in surrogate.model.parameters()} == {id(p) for p in model.parameters()}


def test_soft_routing_ends_in_the_native_values():
    for inference in ("batch", "context"):
        hpm = HPM(inference=inference, eval_batch=5)
        model, x = defended(hpm), images(9)
        soft = hpm.surrogates(model)["soft-1"].model
        head_of(soft).tau = 1e-3
        torch.testing.assert_close(soft(x), model(x), rtol=1e-4, atol=1e-4)


def test_without_mixing_only_the_linear_head_is_another_model():
    hpm = HPM(mix=1.0)
    assert list(hpm.surrogates(defended(hpm))) == ["fc_head"]


# Mistakes and configs


def test_only_a_linear_head_is_replaced():
    model = bare()
    linear = model.head
    assert HPM().apply(model) is model and head_of(model).linear is linear
    assert not head_of(HPM().apply(bare().eval())).training
    with pytest.raises(UserError, match="the head of the model is HPMHead, and HPM needs a linear"):
        HPM().apply(model)
    with pytest.raises(UserError, match="Classifier has no HPM head"):
        HPM().surrogates(bare())


MISTAKES = [
    (lambda: HPM(momentum=1.1), r"defense\.momentum=1\.1 is not between 0 and 1"),
    (lambda: HPM(momentum=math.nan), r"defense\.momentum=nan is not"),
    (lambda: HPM(mix=-0.1), r"defense\.mix=-0\.1 is not between 0 and 1"),
    (lambda: HPM(tau=0), r"defense\.tau=0 is not a number above 0"),
    (lambda: HPM(tau=math.inf), r"defense\.tau=inf is not"),
    (lambda: HPM(fc_weight=-1), r"defense\.fc_weight=-1 is not a number from 0 on"),
    (lambda: HPM(inference="contxt"), r"defense\.inference=contxt is not .*mean 'context'"),
    (lambda: HPM(eval_batch=0), r"defense\.eval_batch=0 is not at least 1"),
]


def test_values_out_of_range_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 8


def test_the_shipped_config_writes_out_every_field_and_its_default():
    text = options("defense")["hpm"].read_text()
    node = OmegaConf.create(text)
    defense = build(node, "defense")
    assert isinstance(defense, Defense) and defense == HPM()
    assert node.keys() - {"_target_"} == {field.name for field in fields(HPM)}
    assert text.startswith("# advbench train defense=hpm ") and text.count("# ours") == 5
