"""Small real images for `recipes/vision.py`: scikit-learn's handwritten digits, and what is done to them at test.

Images have the shape `(N, 1, 16, 16)`, pixels from 0 to 1: the 8 x 8 pixels of the set, enlarged twice.
"""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch.nn import functional

NUM_CLASSES, IMAGE_SIZE = 10, 16
SPLITS = {"train": 300, "validation": 300, "test": 1197}


def load_splits() -> dict[str, dict[str, torch.Tensor]]:
    """Read the 1,797 digits and part them, in an order that is always the same.

    Returns:
        `dict`: split to `pixel_values` of shape `(N, 1, 16, 16)` and `labels` of shape `(N,)`.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = functional.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = dict(zip(SPLITS, order.split(list(SPLITS.values())), strict=True))
    labels = torch.tensor(digits.target)
    return {name: {"pixel_values": images[part], "labels": labels[part]} for name, part in parts.items()}


def as_rows(images: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Make a split a data set for a Trainer."""
    columns = zip(images["pixel_values"], images["labels"], strict=True)
    return [{"pixel_values": pixels, "labels": label} for pixels, label in columns]


def cut_out(images: torch.Tensor, size: int) -> torch.Tensor:
    """Blank a square of `size` x `size` pixels at a random place of each image (DeVries and Taylor 2017)."""
    starts = torch.randint(0, IMAGE_SIZE - size + 1, (len(images), 2, 1))
    pixels = torch.arange(IMAGE_SIZE)
    inside = (pixels >= starts) & (pixels < starts + size)
    return images.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.0)


def _warp(images: torch.Tensor, angle: float, shift: float) -> torch.Tensor:
    """Turn every image by an angle (radians) and move it by a part of its size, in random directions."""
    sign = torch.randint(0, 2, (3, len(images))) * 2.0 - 1
    turned, right, down = angle * sign[0], 2 * shift * sign[1], 2 * shift * sign[2]
    rows = [torch.cos(turned), -torch.sin(turned), right, torch.sin(turned), torch.cos(turned), down]
    grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


# What no model is trained on, by name; each draws from torch's global generator.
SHIFTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clean": lambda images: images,
    "gaussian": lambda images: images + 0.3 * torch.randn_like(images),
    "shifted": lambda images: _warp(images, 0.0, 1 / 8),  # by one of the eight pixels, along both axes
    "rotated": lambda images: _warp(images, 0.5, 0.0),  # by 29 degrees
    "low_contrast": lambda images: 0.2 + 0.6 * images,
    "occluded": lambda images: cut_out(images, 6),
}
