"""MFDV-SNN: its noise, its two loss terms and its mean network, each against a closed form."""

from __future__ import annotations

import csv
import math
from dataclasses import fields

import pytest
import torch
from omegaconf import OmegaConf
from small import THREAT, assert_same_weights, fit, net
from torch import Tensor, nn

from advbench.backbones.base import Classifier
from advbench.backbones.convnet import convnet
from advbench.config import build, options, shipped
from advbench.defenses.base import Part, PartName, Step, Traits
from advbench.defenses.mfdv_snn import MFDVSNN, RHO_MIN, VarianceHead
from advbench.errors import UserError
from advbench.experiments.checkpoints import load_weights
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import TRADES
from advbench.runs.fingerprint import model_sha256
from advbench.training.checkpoint import save_weights
from advbench.training.trainer import Trainer


def head_of(model: Classifier) -> VarianceHead:
    assert isinstance(model.head, VarianceHead)
    return model.head


def small(defense: MFDVSNN | None = None) -> Classifier:
    """Images (1, 1, 3), which are the features; D' = 4, three classes; weights all at random."""
    model = Classifier(nn.Flatten(), num_features=3, num_classes=3, input_shape=(1, 1, 3))
    model = (defense or MFDVSNN(features=4)).apply(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 1, 1, 3, generator=torch.Generator().manual_seed(1))


def affine(linear: nn.Linear, h: Tensor) -> Tensor:
    return h @ linear.weight.T + linear.bias


def record(model: Classifier, *, borrowed: tuple[PartName, ...] = (), **parts: Tensor) -> Step:
    seen = {
        name: Part(x, model.features(x), model.head(model.features(x))) for name, x in parts.items()
    }
    y = torch.zeros(len(next(iter(parts.values()))), dtype=torch.int64)
    return Step(
        y, seen.get("clean"), seen.get("adversarial"), epoch=0, step=0, borrowed=borrowed
    )  # fmt: skip


# Noise


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("draws", [1, 3])
def test_noise_is_of_each_row_and_each_draw(training, draws):
    model = small(MFDVSNN(features=4, draws=draws)).train(training)
    same = images(1).expand(2, -1, -1, -1)
    torch.manual_seed(0)
    first, second = model(same), model(same)
    assert first.shape == (2, 3)
    assert (first[0] - first[1]).abs().min() > 1e-3, "two equal rows of a batch"
    assert (first - second).abs().min() > 1e-3, "the same batch again"
    torch.manual_seed(0)
    assert torch.equal(model(same), first)


def test_logits_of_one_draw_have_the_mean_and_the_covariance_of_the_formula():
    n = 40_000
    model, x = small(), images(1)
    head = head_of(model)
    h = x.flatten(1)
    mean = affine(head.classifier, affine(head.mu, h))[0]
    weight = head.classifier.weight
    covariance = weight @ affine(head.rho, h)[0].exp().diag() @ weight.T
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(x.expand(n, -1, -1, -1))
    variances = covariance.diag()
    assert variances.min() > 0.1
    assert ((logits.mean(0) - mean).abs() < 4 * (variances / n).sqrt()).all()
    # Of n normal pairs the sample covariance has the variance (c_ii c_jj + c_ij^2) / n.
    bound = 4 * ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    assert ((logits.T.cov() - covariance).abs() < bound).all()


def test_noise_is_clamped_on_both_sides():
    model, x = small(MFDVSNN(features=4, rho_max=1.0)), images()
    head = head_of(model)
    with torch.no_grad():
        head.rho.weight.zero_()
        head.rho.bias.copy_(torch.tensor([-99.0, -2.0, 0.5, 99.0]))
        head.classifier.weight.copy_(torch.eye(4)[:3])
        assert head.log_variance(x.flatten(1))[0].tolist() == [RHO_MIN, -2.0, 0.5, 1.0]
        mu = affine(head.mu, x.flatten(1))
        torch.manual_seed(0)
        noise = torch.randn(1, 5, 4)[0]
        torch.manual_seed(0)
        wanted = (mu + torch.tensor([-5.0, -1.0, 0.25, 0.5]).exp() * noise)[:, :3]
        torch.testing.assert_close(model(x), wanted + head.classifier.bias)


def test_several_draws_are_the_log_of_the_mean_softmax():
    model, x = small(MFDVSNN(features=4, draws=7)), images().requires_grad_()
    head = head_of(model)
    torch.manual_seed(0)
    logits = model(x)

    torch.manual_seed(0)
    noise = torch.randn(7, 5, 4)
    h = x.flatten(1)
    mu, sigma = affine(head.mu, h), affine(head.rho, h).exp().sqrt()
    draws = [affine(head.classifier, mu + sigma * noise[i]) for i in range(7)]
    wanted = sum(draw.softmax(1) for draw in draws) / 7
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(logits, wanted.log())
    pull = torch.randn(5, 3)
    ours, theirs = (torch.autograd.grad((v * pull).sum(), x)[0] for v in (logits, wanted.log()))
    torch.testing.assert_close(ours, theirs)
    assert (ours.abs().sum() > 0).all()


def test_training_takes_one_draw():
    model, x = small(MFDVSNN(features=4, draws=7)).train(), images()
    single = small().train()
    torch.manual_seed(0)
    logits = model(x)
    torch.manual_seed(0)
    assert torch.equal(logits, single(x))


# The mean network


def test_the_mean_network_has_no_noise_and_leaves_the_model_alone():
    defense = MFDVSNN(features=4)
    model, x = small(defense), images()
    head, before = head_of(model), model_sha256(model)
    surrogates = defense.surrogates(model)
    assert list(surrogates) == ["mean"]
    surrogate = surrogates["mean"]
    assert not surrogate.exact and not surrogate.needs_clean_input
    mean = surrogate.model
    wanted = affine(head.classifier, affine(head.mu, x.flatten(1)))
    torch.testing.assert_close(mean(x), wanted)
    assert torch.equal(mean(x), mean(x)) and not mean.training
    assert head.noise and not torch.equal(model(x), model(x))
    assert model_sha256(model) == before != model_sha256(mean), "a target of its own in the records"
    ours, theirs = list(mean.parameters()), list(model.parameters())
    assert len(ours) == 6 and all(a is b for a, b in zip(ours, theirs, strict=True))


def test_many_draws_tend_to_the_mean_network():
    defense, n = MFDVSNN(features=4), 20_000
    model = defense.apply(convnet(num_classes=10, input_shape=[1, 8, 8]).build()).eval()
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mean = defense.surrogates(model)["mean"].model(x)[0]
        h = model.features(x).expand(n, -1)
        torch.manual_seed(0)
        draws = model.head(h)
    assert ((draws.mean(0) - mean).abs() < 4 * draws.std(0) / math.sqrt(n)).all()


# Loss terms


@pytest.mark.parametrize(
    ("bias", "clamped", "slope"),
    [
        (0.7, 0.7, 1.0),
        (3.99, 3.99, 1.0),
        (4.01, 4.0, 0.0),
        (-9.99, -9.99, 1.0),
        (-11.0, -10.0, 0.0),
    ],
)
def test_the_variance_term_by_hand(bias, clamped, slope):
    defense = MFDVSNN(features=4, variance_weight=0.3)
    model, x = small(defense), images()
    head = head_of(model)
    with torch.no_grad():
        head.rho.weight.zero_()
        head.rho.bias.zero_()
        head.rho.bias[1] = bias
    terms = defense.loss_terms(model, record(model, clean=x))
    assert terms.keys() == {"variance", "classifier_decay"}
    torch.testing.assert_close(terms["variance"], torch.tensor(-0.3 * clamped / 4))
    by_weight, by_bias = torch.autograd.grad(terms["variance"], list(head.rho.parameters()))
    wanted = torch.full((4,), -0.3 / 4)
    wanted[1] *= slope
    torch.testing.assert_close(by_bias, wanted)
    torch.testing.assert_close(by_weight, wanted[:, None] * x.flatten(1).mean(0))


def test_the_variance_term_is_of_the_parts_that_the_recipe_trains_on():
    defense = MFDVSNN(features=4, variance_weight=1.0)
    model = small(defense)
    clean, adversarial = images(), 2 * images()
    rho = [affine(head_of(model).rho, x.flatten(1)).mean() for x in (clean, adversarial)]
    both = defense.loss_terms(model, record(model, clean=clean, adversarial=adversarial))
    torch.testing.assert_close(both["variance"], -(rho[0] + rho[1]) / 2)
    step = record(model, borrowed=("clean",), clean=clean, adversarial=adversarial)
    one = defense.loss_terms(model, step)
    torch.testing.assert_close(one["variance"], -rho[1])
    assert abs(rho[0] - rho[1]) > 0.01


def test_the_decay_is_of_the_classifier_alone():
    defense = MFDVSNN(features=4, classifier_decay=0.2)
    model = small(defense)
    head = head_of(model)
    term = defense.loss_terms(model, record(model, clean=images()))["classifier_decay"]
    torch.testing.assert_close(term, 0.1 * head.classifier.weight.norm().square())
    grads = torch.autograd.grad(term, list(model.parameters()), allow_unused=True)
    seen = {name for (name, _), grad in zip(model.named_parameters(), grads, strict=True)
            if grad is not None}  # fmt: skip
    assert seen == {"head.classifier.weight"}
    (gradient,) = (grad for grad in grads if grad is not None)
    torch.testing.assert_close(gradient, 0.2 * head.classifier.weight)


# Surgery and training


def test_surgery_replaces_a_linear_head():
    model = MFDVSNN(draws=2).apply(convnet(num_classes=7, input_shape=[3, 8, 8]).build().eval())
    head = head_of(model)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if "weight" in name}
    assert shapes == {"mu.weight": (64, 64), "rho.weight": (64, 64), "classifier.weight": (7, 64)}
    assert not head.training and not head.classifier.training
    assert torch.equal(head.log_variance(torch.randn(5, 64)), torch.zeros(5, 64)), "variance 1"
    assert MFDVSNN().traits(model) == Traits(stochastic=True, gradient="exact")


def test_another_head_is_refused():
    model = Classifier(
        nn.Flatten(), num_features=3, num_classes=3, input_shape=(1, 1, 3), head=nn.Identity()
    )
    with pytest.raises(UserError, match="a linear head and this one is Identity"):
        MFDVSNN().apply(model)
    with pytest.raises(UserError, match="a linear head and this one is VarianceHead"):
        MFDVSNN().apply(small())


RECIPES = {
    "standard": (Standard(), ["train_clean"]),
    "pgd_at": (PGDAT(threat=THREAT, steps=2), ["train_adversarial"]),
    "trades": (TRADES(threat=THREAT, steps=2), ["train_clean", "train_adversarial"]),
}


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_steps_of_training(tmp_path, name, precision, bfloat16):
    assert len(RECIPES) == 3
    recipe, columns = RECIPES[name]
    defense = MFDVSNN(features=8, draws=2)
    model = defense.apply(net())
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = Trainer(epochs=1, batch_size=48, val_steps=1, precision=precision)
    summary = fit(tmp_path, trainer, model=model, recipe=recipe, defense=defense)
    assert summary.steps == 2
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert [key for key in row if key.startswith("train_")] == columns
    assert all(math.isfinite(float(value)) for value in row.values())
    assert float(row["loss_classifier_decay"]) > 0
    # At the start rho = 0: of the two steps the first adds nothing.
    assert float(row["loss_variance"]) != 0
    # The first bias has no effect: batch norm takes it away.
    still = {key for key, value in model.named_parameters() if torch.equal(value, before[key])}
    assert still <= {"trunk.0.bias"}
    assert all(p.dtype == torch.float32 for p in model.parameters())

    # Kernels round by the layout of the weights, which training changes.
    other = defense.apply(net()).to(memory_format=torch.channels_last)
    load_weights(other, tmp_path / "last.safetensors")
    assert_same_weights(model, other)
    x = torch.rand(4, 1, 4, 4)
    answers = []
    for trained in (model, other):
        torch.manual_seed(0)
        answers.append(trained.eval()(x))
    assert torch.equal(*answers)


def test_the_weights_hold_all_of_it(tmp_path):
    model, other = small(), small()
    for parameter in other.parameters():
        parameter.data.zero_()
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert model_sha256(other) == model_sha256(model)
    assert model_sha256(small(MFDVSNN(features=4, draws=2))) != model_sha256(model)
    with pytest.raises(UserError, match="do not match the model"):
        load_weights(net(), tmp_path / "w.safetensors")


# Mistakes and the config

MISTAKES = [
    (lambda: MFDVSNN(features=0), "defense.features=0 is not at least 1"),
    (lambda: MFDVSNN(draws=0), "defense.draws=0 is not at least 1"),
    (lambda: MFDVSNN(variance_weight=-1.0), "defense.variance_weight=-1 is not a number from 0"),
    (lambda: MFDVSNN(variance_weight=math.nan), "defense.variance_weight=nan"),
    (lambda: MFDVSNN(classifier_decay=math.inf), "defense.classifier_decay=inf"),
    (lambda: MFDVSNN(rho_max=-10.0), "defense.rho_max=-10 is not a number above -10"),
    (lambda: MFDVSNN(rho_max=math.inf), "defense.rho_max=inf"),
]


def test_values_out_of_range_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 7


def test_the_config_gives_the_defaults():
    text = options("defense")["mfdv_snn"].read_text()
    node = OmegaConf.create(text)
    assert node.keys() - {"_target_"} == {field.name for field in fields(MFDVSNN)}
    assert build(shipped("defense", "mfdv_snn"), "defense") == MFDVSNN()
    assert text.startswith("# advbench train defense=mfdv_snn")
