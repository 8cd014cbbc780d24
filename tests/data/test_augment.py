"""Augmentation: keyed by the generator, exact where it is off."""

from __future__ import annotations

import pytest
import torch
from made_up_data import rows
from torch import Tensor

from advbench.data.augment import Augment

# --- augmentation ----------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch() -> Tensor:
    """64 images of 3x6x5 with all pixels different and above zero."""
    return (torch.arange(64 * 90).view(64, 3, 6, 5) + 1) / (64 * 90)


def test_nothing_on_gives_the_input_and_draws_nothing(batch: Tensor) -> None:
    g = generator()
    before = g.get_state()
    assert Augment()(batch, g) is batch
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop=2),
        Augment(flip=True),
        Augment(cutout=3),
        Augment(crop=2, flip=True, cutout=3),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_augmentation_is_keyed_by_the_generator_and_leaves_its_input(
    augment: Augment, layout: torch.memory_format, batch: Tensor
) -> None:
    batch = batch.contiguous(memory_format=layout)
    before = batch.clone()
    x = augment(batch, generator())
    assert torch.equal(batch, before)
    assert x.shape == batch.shape and x.dtype == batch.dtype
    assert torch.equal(x, augment(batch, generator()))
    assert not torch.equal(x, augment(batch, generator(1)))
    x.zero_()
    assert torch.equal(batch, before), "the result does not share the memory of the input"
    # Equal images, different draws.
    same = augment(batch[:1].expand(64, -1, -1, -1), generator())
    assert len(rows(same)) > 1


def test_flip_mirrors_about_half(batch: Tensor) -> None:
    x = Augment(flip=True)(batch, generator())
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x, batch, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(x, batch, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 16 <= sum(mirrored) <= 48
    # The same draws once more undo it.
    assert torch.equal(Augment(flip=True)(x, generator()), batch)


def test_crop_is_a_window_of_the_padded_image(batch: Tensor) -> None:
    batch = batch[:1].expand(500, -1, -1, -1)
    x = Augment(crop=2)(batch, generator())
    padded = torch.zeros(3, 10, 9)
    padded[:, 2:8, 2:7] = batch[0]
    windows = {
        padded[:, top : top + 6, left : left + 5].contiguous().numpy().tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    assert len(windows) == 25
    found = rows(x)
    assert found.keys() == windows.keys(), "every window, and nothing else"
    assert max(found.values()) < 50, "20 each are expected"


def test_crop_and_flip_together_mirror_a_window(batch: Tensor) -> None:
    batch = batch[:1].expand(500, -1, -1, -1)
    crops = rows(Augment(crop=1)(batch, generator()))
    both = rows(Augment(crop=1, flip=True)(batch, generator()))
    mirrored = rows(Augment(crop=1)(batch, generator()).flip(-1))
    assert len(crops) == 9 and both.keys() == crops.keys() | mirrored.keys()


def test_cutout_is_one_square_that_the_border_clips() -> None:
    ones = torch.ones(500, 2, 9, 8)
    x = Augment(cutout=3)(ones, generator())
    assert torch.equal(x[:, 0], x[:, 1]), "all channels alike"
    holes = 1 - x[:, 0]
    assert set(holes.unique().tolist()) == {0.0, 1.0}
    heights, widths = holes.amax(2).sum(1), holes.amax(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths), "a rectangle"
    assert set(heights.tolist()) == set(widths.tolist()) == {2.0, 3.0}
    # A centre that is not in the first or last row and column leaves the whole square.
    inside = (heights * widths == 9).float().mean()
    assert abs(inside - (7 / 9) * (6 / 8)) < 0.1
    assert Augment(cutout=4)(ones, generator()).sub(1).abs().sum((1, 2, 3)).max() == 2 * 16
