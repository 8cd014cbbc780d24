"""CutMix: rectangles, shares and draws, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advbench.data import sources
from advbench.data.augment import Augment
from advbench.data.cutmix import cutmix, mixed, rectangles

COUNT, K = 400, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Images of one colour each, all different: (400, 2, 8, 6); labels of 5 classes."""
    x = (torch.arange(COUNT).float() / COUNT).view(-1, 1, 1, 1).expand(-1, 2, 8, 6).contiguous()
    return x, torch.arange(COUNT) % K


def test_rectangles_by_hand() -> None:
    # A quarter of 8x6 about (4, 3): 4x3, rows 2..5 and columns 2..4.
    lam, row, column = torch.tensor([0.75]), torch.tensor([4]), torch.tensor([3])
    (inside,) = rectangles(lam, row, column, 8, 6)
    want = torch.zeros(8, 6, dtype=torch.bool)
    want[2:6, 2:5] = True
    assert torch.equal(inside, want)
    # About a corner, three quarters of it stick out.
    (inside,) = rectangles(lam, torch.tensor([0]), torch.tensor([0]), 8, 6)
    want = torch.zeros(8, 6, dtype=torch.bool)
    want[:2, :2] = True
    assert torch.equal(inside, want)


def test_lambda_of_one_is_the_identity_and_zero_replaces(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    partner = torch.arange(COUNT).flip(0)
    middle = torch.full((COUNT,), 4), torch.full((COUNT,), 3)
    inside = rectangles(torch.ones(COUNT), *middle, 8, 6)
    same, classes, shares = mixed(x, y, K, partner, inside)
    assert torch.equal(same, x) and torch.equal(classes, y)
    assert torch.equal(shares, F.one_hot(y, K).float())
    inside = rectangles(torch.zeros(COUNT), *middle, 8, 6)
    assert inside.all(), "its whole size, about the middle"
    other, classes, shares = mixed(x, y, K, partner, inside)
    assert torch.equal(other, x[partner]) and torch.equal(classes, y[partner])
    assert torch.equal(shares, F.one_hot(y[partner], K).float())


def test_shares_are_those_of_the_pixels(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    before = x.clone()
    images, classes, shares = cutmix(x, y, K, 1.0, generator())
    assert torch.equal(x, before) and torch.equal(images[:, 0], images[:, 1])
    assert torch.allclose(shares.sum(1), torch.ones(COUNT), rtol=0, atol=1e-6)
    rows, clipped, mixed_rows = 0, 0, 0
    for image, own, label, share in zip(images[:, 0], range(COUNT), classes, shares, strict=True):
        sources_seen = (image * COUNT).round().long()
        others = set(sources_seen.unique().tolist()) - {own}
        assert len(others) <= 1, "one other image"
        by_pixels = torch.bincount(sources_seen.flatten() % K, minlength=K) / 48
        assert torch.allclose(share, by_pixels, rtol=0, atol=1e-6)
        assert share[label] == share.max()
        if share[y[own]] == share.max():
            assert label == y[own], "of equals its own"
        foreign = sources_seen != own
        assert foreign.sum() == foreign.any(1).sum() * foreign.any(0).sum(), "a rectangle"
        rows += 1
        mixed_rows += len(others)
        clipped += bool(foreign[0].any() or foreign[-1].any())
    assert rows == COUNT and mixed_rows > 300 and clipped > 50


def test_pairs_are_a_permutation(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    images = cutmix(x, y, K, 1.0, generator())[0][:, 0]
    partners = []
    for own, image in enumerate((images * COUNT).round().long()):
        partners += [number for number in image.unique().tolist() if number != own]
    assert len(set(partners)) == len(partners) > 300


def test_half_are_mixed_at_one_half(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch

    def share(probability: float) -> float:
        images = cutmix(x, y, K, probability, generator(1))[0]
        return (images != x).flatten(1).any(1).float().mean().item()

    assert share(0.0) == 0
    # Of those drawn, some rectangles have no pixel: a lambda near 1.
    assert share(1.0) > 0.9 and abs(share(0.5) / share(1.0) - 0.5) < 0.1


def test_a_rectangle_covers_what_lambda_leaves() -> None:
    lam = torch.linspace(0, 1, 500)
    middle = torch.full((500,), 32)
    share = rectangles(lam, middle, middle, 64, 64).sum((1, 2)) / 64**2
    # The sides are rounded down to whole pixels, each by less than one of 64.
    assert (share <= 1 - lam + 1e-6).all() and (1 - lam - share).max() < 2 / 64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_keyed_by_the_generator(
    layout: torch.memory_format, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch[0].contiguous(memory_format=layout), batch[1]
    one, two = (cutmix(x, y, K, 0.5, generator()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(one, cutmix(batch[0], y, K, 0.5, generator()), strict=True)
    )
    assert not torch.equal(one[0], cutmix(x, y, K, 0.5, generator(1))[0])


def test_the_data_set_hands_back_shares_where_it_is_on() -> None:
    plain = sources.digits().build()
    x, y = plain.train.fetch(torch.arange(32), "cpu")
    g = generator()
    before = g.get_state()
    same, classes, shares = plain.augmented(x, y, g)
    assert same is x and classes is y and shares is None and torch.equal(g.get_state(), before)
    data = sources.digits(augment=Augment(crop=1, cutmix=1.0)).build()
    images, classes, shares = data.augmented(x, y, generator())
    assert shares is not None and shares.shape == (32, 10) and classes.shape == y.shape
    assert torch.equal(shares.argmax(1)[classes != y], classes[classes != y])
    # The windows are cut out first, and drawn as they are without it.
    g = generator()
    windows = Augment(crop=1)(x, g)
    assert torch.equal(images, cutmix(windows, y, 10, 1.0, g)[0])


def test_cross_entropy_takes_the_shares_as_its_mean_over_labels() -> None:
    logits = torch.randn(8, K, generator=generator())
    y, other = torch.arange(8) % K, torch.arange(1, 9) % K
    share = torch.linspace(0, 1, 8)[:, None]
    shares = F.one_hot(y, K) * (1 - share) + F.one_hot(other, K) * share
    want = (1 - share[:, 0]) * F.cross_entropy(logits, y, reduction="none")
    want = want + share[:, 0] * F.cross_entropy(logits, other, reduction="none")
    assert torch.allclose(F.cross_entropy(logits, shares), want.mean())
