"""The digits and what is done to them at test."""

import pytest
import torch

from recipes.images import IMAGE_SIZE, SHIFTS, SPLITS, as_rows, cut_out, load_splits


@pytest.fixture(scope="module")
def splits():
    return load_splits()


def test_splits_are_whole_apart_and_the_same_each_time(splits):
    sizes = {name: len(images["labels"]) for name, images in splits.items()}
    assert sizes == SPLITS
    pixels = torch.cat([images["pixel_values"] for images in splits.values()])
    assert pixels.shape == (1797, 1, IMAGE_SIZE, IMAGE_SIZE)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert len(pixels.unique(dim=0)) == 1797
    assert torch.equal(load_splits()["test"]["pixel_values"], splits["test"]["pixel_values"])


def test_rows_hold_one_image_and_its_label(splits):
    rows = as_rows(splits["validation"])
    assert len(rows) == SPLITS["validation"]
    assert torch.equal(rows[7]["pixel_values"], splits["validation"]["pixel_values"][7])
    assert rows[7]["labels"] == splits["validation"]["labels"][7]


def test_a_square_is_blanked_somewhere():
    images = cut_out(torch.ones(50, 1, IMAGE_SIZE, IMAGE_SIZE), 6)
    blank = images == 0
    assert blank.sum((1, 2, 3)).tolist() == [36] * 50
    assert blank.any(2).sum((1, 2)).tolist() == [6] * 50
    assert len(images.unique(dim=0)) > 20


def test_images_are_moved_by_two_pixels_along_both_axes():
    image = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    image[..., 7, 7] = 1.0
    row, column = (SHIFTS["shifted"](image)[0, 0] > 0.99).nonzero()[0].tolist()
    assert (abs(row - 7), abs(column - 7)) == (2, 2)


def test_images_are_turned_by_half_a_radian():
    image = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    image[..., 7:9, 13:15] = 1.0  # right of the middle
    turned = SHIFTS["rotated"](image)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(16.0) - 7.5, torch.arange(16.0) - 7.5, indexing="ij")
    angle = torch.atan2((turned * rows).sum(), (turned * columns).sum())
    assert abs(angle) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", SHIFTS)
def test_changed_images_keep_their_shape_and_change_unless_clean(splits, name):
    images = splits["validation"]["pixel_values"]
    changed = SHIFTS[name](images)
    assert changed.shape == images.shape
    assert torch.equal(changed, images) == (name == "clean")
