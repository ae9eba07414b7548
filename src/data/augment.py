"""Training augmentation of whole uint8 batches, at the stored resolution and on any device.

Every ingredient comes in two halves: `draw_*` draws one set of parameters per sample from a CPU
generator (so they are the same whatever the device), and a pure function applies them to the batch
without a loop over samples and without reading anything back from the device. Distributions, defaults
and pixels are those of torchvision's transforms (v2) of the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nn_functional
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from src.config import AugmentConfig
from src.device import send

CROP_RATIO = (3 / 4, 4 / 3)
ERASE_SCALE = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
TRIES = 10  # torchvision draws a box up to ten times, then gives up
BINS = 31


def augment(
    images_BCHW: Tensor, config: AugmentConfig, generator: torch.Generator, fill: Sequence[int]
) -> Tensor:
    """Crop, flip, rotate, jitter, RandAugment, TrivialAugment, erase, cut out: each sample by its own draws.

    `images_BCHW`: uint8, 1 or 3 channels, any device. `generator`: on the CPU. `fill`: C levels, the colour
    of erased rectangles and of what lies outside a turned image; the mean colour of the weights'
    preprocessing is 0 after normalisation.
    Returns uint8 (B,C,H,W) on the same device; the input is not modified, and is itself the result if
    nothing is switched on.
    """
    images = images_BCHW
    assert images.dtype == torch.uint8 and images.ndim == 4 and len(fill) == images.shape[1]
    n_images, _, height, width = images.shape
    if config.crop_scale != (1.0, 1.0):
        boxes = draw_crops(n_images, height, width, config.crop_scale, generator)
        images = resized_crop(images, boxes)
    if config.crop_padding > 0:
        shifts = torch.randint(2 * config.crop_padding + 1, (n_images, 2), generator=generator)
        images = shift(images, shifts - config.crop_padding)
    if config.flip > 0:
        images = flip(images, torch.rand(n_images, generator=generator) < config.flip)
    if config.rotation > 0 and config.rotation_p > 0:
        chosen = torch.rand(n_images, generator=generator) < config.rotation_p
        images = rotate(images, _draw_within(config.rotation, (n_images,), generator), chosen, fill)
    if config.jitter > 0:
        images = jitter(images, 1 + _draw_within(config.jitter, (3, n_images), generator))
    if config.hue > 0:
        images = shift_hue(images, _draw_within(config.hue, (n_images,), generator))
    for _ in range(config.randaugment_ops):
        images = rand_augment(images, draw_codes(n_images, generator), config.randaugment_magnitude)
    if config.trivial_augment:
        bins = torch.randint(BINS, (n_images,), generator=generator)
        images = trivial_augment(images, draw_codes(n_images, generator), bins)
    if config.erasing > 0:
        boxes = draw_erasures(n_images, height, width, config.erasing, generator)
        images = erase(images, boxes, fill)
    if config.cutout > 0:
        images = erase(images, draw_cutouts(n_images, height, width, config.cutout, generator), fill)
    return images


def mixing(config: AugmentConfig, n_classes: int) -> v2.Transform | None:
    """torchvision's mixup or CutMix (or one of them at each call) on (images_BCHW, labels_B); None for none.

    Gives mixed images and labels as probabilities (B,K). Draws from torch's default generator.
    """
    mixes = [
        kind(alpha=alpha, num_classes=n_classes)
        for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        if alpha > 0
    ]
    return v2.RandomChoice(mixes) if mixes else None


# Crops, flips and rotations ------------------------------------------------------------------------


def draw_crops(
    n_images: int, height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Boxes (B,4) int64 of top, left, height, width, as `RandomResizedCrop` draws them."""
    area, ratio = _draw_areas(n_images, height * width, scale, CROP_RATIO, generator)
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    central = (
        min(height, round(width / CROP_RATIO[0])),
        min(width, round(height * CROP_RATIO[1])),
    )
    size, found = _first_fit(heights, widths, fits, central)
    room = torch.tensor([height, width]) - size
    corner = torch.where(found[:, None], _draw_corners(room, generator), room // 2)
    return torch.cat([corner, size], dim=1)


def resized_crop(images_BCHW: Tensor, boxes_B4: Tensor) -> Tensor:
    """Each sample's box, stretched to the whole image: bilinear, no antialias, within one level."""
    boxes = send(boxes_B4.float(), images_BCHW.device)
    top, left, box_height, box_width = boxes.unbind(1)
    grid_y = _box_coordinates(top, box_height, images_BCHW.shape[2])
    grid_x = _box_coordinates(left, box_width, images_BCHW.shape[3])
    size = (len(boxes), grid_y.shape[1], grid_x.shape[1])
    grid_BHW2 = torch.stack([grid_x[:, None, :].expand(size), grid_y[:, :, None].expand(size)], dim=-1)
    sampled = nn_functional.grid_sample(images_BCHW.float(), grid_BHW2, align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def shift(images_BCHW: Tensor, offsets_B2: Tensor) -> Tensor:
    """Each sample's window moved by (down, right) pixels; outside, the image is reflected at its edge.

    With offsets in [-p, p] this is a random crop of the image padded by p.
    """
    offsets = send(offsets_B2, images_BCHW.device)
    rows, columns = (
        _reflect(offsets[:, axis, None] + torch.arange(length, device=offsets.device), length)
        for axis, length in enumerate(images_BCHW.shape[2:])
    )
    source = rows[:, :, None] * images_BCHW.shape[3] + columns[:, None, :]
    return _gather(images_BCHW.flatten(2), source.flatten(1)).view(images_BCHW.shape)


def flip(images_BCHW: Tensor, chosen_B: Tensor) -> Tensor:
    """Mirror left and right where `chosen_B` (bool, on the CPU)."""
    return _change_some(images_BCHW, chosen_B, lambda images, _: images.flip(-1))


def rotate(images_BCHW: Tensor, degrees_B: Tensor, chosen_B: Tensor, fill: Sequence[int]) -> Tensor:
    """Turn anticlockwise about the centre where `chosen_B` (bool; like `degrees_B` on the CPU): bilinear.

    Outside the image is the colour `fill` (C levels). Pixels whose neighbours are all inside are those of
    torchvision's bilinear `RandomRotation` within one level. On the border image and colour are blended once,
    as if the image were padded with the colour before it is turned; torchvision lets it in twice.
    """
    height, width = images_BCHW.shape[2:]
    colour = send(torch.tensor(fill, dtype=torch.float32), images_BCHW.device).view(1, -1, 1, 1)

    def turn(images: Tensor, chosen: Tensor) -> Tensor:
        if not len(images):
            return images  # affine_grid refuses them
        angle = degrees_B[chosen].deg2rad()
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        rows = [cos, -sin * height / width, zero, sin * width / height, cos, zero]
        theta_B23 = send(torch.stack(rows, dim=1).view(-1, 2, 3), images.device)
        grid_BHW2 = nn_functional.affine_grid(theta_B23, list(images.shape), align_corners=False)
        # What grid_sample finds outside is 0: of the difference from the colour, so that it is the colour.
        turned = nn_functional.grid_sample(images - colour, grid_BHW2, align_corners=False) + colour
        return turned.round_().clamp_(0, 255).to(torch.uint8)

    return _change_some(images_BCHW, chosen_B, turn)


# Colour jitter -------------------------------------------------------------------------------------


def jitter(images_BCHW: Tensor, factors_3B: Tensor) -> Tensor:
    """Brightness, then contrast, then saturation times each sample's factor, as `adjust_*` of torchvision.

    Each of them is within one level of it. torchvision's `ColorJitter` takes them, and the hue, in another
    order at every call; here the order is fixed, and the hue comes after. `factors_3B`: from 0, on the CPU.
    One channel has no saturation.
    """
    brightness, contrast, saturation = send(factors_3B, images_BCHW.device)[..., None, None, None]
    images = _blend(images_BCHW, images_BCHW.new_zeros(1), brightness)
    images = _blend(images, F.rgb_to_grayscale(images).float().mean((1, 2, 3), keepdim=True), contrast)
    return _blend(images, F.rgb_to_grayscale(images), saturation)


def shift_hue(images_BCHW: Tensor, shifts_B: Tensor) -> Tensor:
    """Hue moved on by each sample's part of its circle, within one level of torchvision's `adjust_hue`.

    `shifts_B`: in [-0.5, 0.5], on the CPU. One channel has no hue. The way to HSV and back is short where
    value and saturation stay: a channel lies below the largest by the chroma times a trapezium of the hue.
    """
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    images = F.to_dtype(images_BCHW, torch.float32, scale=True)
    low, value = images.aminmax(dim=1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    distance = torch.where(chroma > 0, chroma, 1)  # a grey pixel has no hue, and none is asked for
    sixth = torch.where(
        value == red,
        (green - blue) / distance,
        torch.where(value == green, 2 + (blue - red) / distance, 4 + (red - green) / distance),
    )
    sixth = sixth + 6 * send(shifts_B, images.device).view(-1, 1, 1, 1)
    place = (sixth + torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)) % 6
    images = value - chroma * torch.minimum(place, 4 - place).clamp_(0, 1)
    return F.to_dtype(images, torch.uint8, scale=True)


# RandAugment (Cubuk et al. 2020) -------------------------------------------------------------------

Op = Callable[[Tensor, float], Tensor]


def _affine(images: Tensor, angle: float = 0.0, translate=(0, 0), shear=(0.0, 0.0), center=None) -> Tensor:
    return F.affine(images, angle, list(translate), 1.0, list(shear), center=center)


def _shear_degrees(magnitude: float) -> float:
    return math.degrees(math.atan(magnitude))


def _sharpness(images: Tensor, factor: float) -> Tensor:
    """torchvision's `adjust_sharpness`, level by level, its 3x3 filter [1 1 1; 1 5 1; 1 1 1] / 13 as sums.

    No sum over 13 lies half-way between two levels, so the order of summation cannot show.
    """
    images = images.float()
    inner = images[..., 1:-1, 1:-1]
    of_three_rows = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    blurred = of_three_rows[..., :-2] + of_three_rows[..., 1:-1] + of_three_rows[..., 2:]
    blurred.add_(inner, alpha=4).div_(13).round_()
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return images.clamp_(0, 255).to(torch.uint8)


# The ops that move pixels come first: what they do does not depend on the pixels' values.
MOVES: dict[str, Op] = {
    "ShearX": lambda images, m: _affine(images, shear=(_shear_degrees(m), 0.0), center=[0, 0]),
    "ShearY": lambda images, m: _affine(images, shear=(0.0, _shear_degrees(m)), center=[0, 0]),
    "TranslateX": lambda images, m: _affine(images, translate=(int(m), 0)),
    "TranslateY": lambda images, m: _affine(images, translate=(0, int(m))),
    "Rotate": lambda images, m: F.rotate(images, m),
}
OPS: dict[str, Op] = MOVES | {
    "Brightness": lambda images, m: F.adjust_brightness(images, 1.0 + m),
    "Color": lambda images, m: F.adjust_saturation(images, 1.0 + m),
    "Contrast": lambda images, m: F.adjust_contrast(images, 1.0 + m),
    "Sharpness": lambda images, m: _sharpness(images, 1.0 + m),
    "Posterize": lambda images, m: F.posterize(images, int(m)),
    "Solarize": lambda images, m: F.solarize(images, m),
    "AutoContrast": lambda images, m: F.autocontrast(images),
    "Equalize": lambda images, m: F.equalize(images),
    "Identity": lambda images, m: images,
}
SIGNED = (*MOVES, "Brightness", "Color", "Contrast", "Sharpness")
LEVELS = ("Brightness", "Posterize", "Solarize")  # these map each level to another, whatever the image
# The order in which a batch is worked through: moves together, levels together, then op by op.
PLACES = (*MOVES, *LEVELS, *(op for op in OPS if op not in (*MOVES, *LEVELS)))
PLACE_OF_CODE = torch.tensor([2 * PLACES.index(op) + sign for op in OPS for sign in (0, 1)])


class Strength(NamedTuple):
    """A bin of 31 on RandAugment's scale, or on TrivialAugment's wider one."""

    magnitude: int
    wide: bool = False


@lru_cache(maxsize=2048)
def signed_magnitude(op: str, negative: bool, strength: Strength, height: int, width: int) -> float:
    """What `op` is called with at a strength: torchvision's scales, in its float32."""
    magnitude, wide = strength
    if op == "Posterize":
        return 8 - round(magnitude / ((BINS - 1) / (6 if wide else 4)))
    if op == "Solarize":
        return 255 * torch.linspace(1.0, 0.0, BINS)[magnitude].item()
    if op not in SIGNED:
        return 0.0
    if wide:
        largest = {"TranslateX": 32.0, "TranslateY": 32.0, "Rotate": 135.0}.get(op, 0.99)
    else:
        largest = {
            "ShearX": 0.3,
            "ShearY": 0.3,
            "TranslateX": 150.0 / 331.0 * width,
            "TranslateY": 150.0 / 331.0 * height,
            "Rotate": 30.0,
        }.get(op, 0.9)
    value = torch.linspace(0.0, largest, BINS)[magnitude].item()
    return -value if negative else value


def draw_codes(n_images: int, generator: torch.Generator) -> Tensor:
    """One op and sign per sample: (B,) int64, twice the op's place in `OPS`, plus one where negative."""
    codes = torch.randint(2 * len(OPS), (n_images,), generator=generator)
    signed = torch.tensor([op in SIGNED for op in OPS])
    return torch.where(signed[codes // 2], codes, codes // 2 * 2)  # one group for each unsigned op


def trivial_augment(images_BCHW: Tensor, codes_B: Tensor, bins_B: Tensor) -> Tensor:
    """TrivialAugment's wide space (Müller & Hutter 2021): each sample's op at its own strength."""
    bins, order = bins_B.sort(stable=True)
    counts = np.bincount(bins.numpy(), minlength=BINS).tolist()
    groups = images_BCHW.index_select(0, send(order, images_BCHW.device)).split(counts)
    done = [
        rand_augment(group, codes, magnitude, wide=True)
        for magnitude, (group, codes) in enumerate(zip(groups, codes_B[order].split(counts), strict=True))
        if len(group)
    ]
    return torch.cat(done).index_select(0, send(order.argsort(), images_BCHW.device))


def rand_augment(images_BCHW: Tensor, codes_B: Tensor, magnitude: int, wide: bool = False) -> Tensor:
    """Apply to each sample the op and sign of its code (`draw_codes`), to all that share it at once.

    `magnitude`: a bin of 31 on RandAugment's scale, or on TrivialAugment's `wide` one. Nearest neighbour and
    black outside the image, as in torchvision: equal to it pixel by pixel.
    """
    strength = Strength(magnitude, wide)
    height, width = images_BCHW.shape[2:]
    places, order = PLACE_OF_CODE[codes_B].sort()
    counts = np.bincount(places.numpy(), minlength=2 * len(PLACES)).tolist()
    n_moves, n_levels = 2 * len(MOVES), 2 * len(LEVELS)
    together = [sum(counts[:n_moves]), sum(counts[n_moves : n_moves + n_levels])]
    grouped = images_BCHW.index_select(0, send(order, images_BCHW.device))
    moved, mapped, *groups = grouped.split([*together, *counts[n_moves + n_levels :]])
    of_moved, of_mapped, _ = places.split([*together, len(places) - sum(together)])
    done = [_move(moved, of_moved, strength), _map_levels(mapped, of_mapped - n_moves, strength)]
    for place, group in enumerate(groups, start=n_moves + n_levels):
        if len(group):
            op = PLACES[place // 2]
            done.append(OPS[op](group, signed_magnitude(op, place % 2 == 1, strength, height, width)))
    return torch.cat(done).index_select(0, send(order.argsort(), images_BCHW.device))


def _move(images_BCHW: Tensor, places_B: Tensor, strength: Strength) -> Tensor:
    """All moves of a batch in one gather of pixels."""
    source = _move_sources(*images_BCHW.shape[2:], strength, images_BCHW.device)
    with_black = nn_functional.pad(images_BCHW.flatten(2), (1, 0))
    moved = _gather(with_black, source.index_select(0, send(places_B, images_BCHW.device)))
    return moved.view(images_BCHW.shape)


def _map_levels(images_BCHW: Tensor, places_B: Tensor, strength: Strength) -> Tensor:
    """All of `LEVELS` in a batch in one lookup."""
    tables = _level_tables(strength, images_BCHW.device)
    tables = tables.index_select(0, send(places_B, images_BCHW.device))
    return tables.gather(1, images_BCHW.flatten(1).long()).view(images_BCHW.shape)


@lru_cache(maxsize=2 * BINS)
def _level_tables(strength: Strength, device: torch.device) -> Tensor:
    """(2 * len(LEVELS), 256) uint8: what each op makes of each level, shown an image that has them all."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    mapped = [
        OPS[op](levels, signed_magnitude(op, negative, strength, 16, 16))
        for op in LEVELS
        for negative in (False, True)
    ]
    return send(torch.cat(mapped).flatten(1), device)


@lru_cache(maxsize=2 * BINS)
def _move_sources(height: int, width: int, strength: Strength, device: torch.device) -> Tensor:
    """(2 * len(MOVES), H*W): number, from 1, of the pixel that each move brings to each place; 0 for none.

    The ops themselves find it out, by moving an image whose pixels are their own numbers (what comes from
    outside is 0). On the CPU, so that every device rounds alike.
    """
    numbers = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    moved = [
        move(numbers, signed_magnitude(op, negative, strength, height, width))
        for op, move in MOVES.items()
        for negative in (False, True)
    ]
    return send(torch.cat(moved).flatten(1).long(), device)


# Random erasing (Zhong et al. 2020) ----------------------------------------------------------------


def draw_erasures(n_images: int, height: int, width: int, p: float, generator: torch.Generator) -> Tensor:
    """Boxes (B,4) int64 of top, left, height, width, as `RandomErasing` draws them; empty for none."""
    chosen = torch.rand(n_images, generator=generator) < p
    area, ratio = _draw_areas(n_images, height * width, ERASE_SCALE, ERASE_RATIO, generator)
    heights, widths = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    size, _ = _first_fit(heights, widths, (heights < height) & (widths < width), (0, 0))
    corner = _draw_corners(torch.tensor([height, width]) - size, generator)
    return torch.cat([corner, size * chosen[:, None]], dim=1)


def draw_cutouts(n_images: int, height: int, width: int, side: int, generator: torch.Generator) -> Tensor:
    """Boxes (B,4) int64 of squares with centres anywhere in the image, cut off at its edges."""
    lengths = torch.tensor([height, width])
    centre = (torch.rand((n_images, 2), generator=generator, dtype=torch.float64) * lengths).long()
    start = (centre - side // 2).clamp(min=0)
    end = (centre - side // 2 + side).minimum(lengths)
    return torch.cat([start, end - start], dim=1)


def erase(images_BCHW: Tensor, boxes_B4: Tensor, fill: Sequence[int]) -> Tensor:
    """Paint each sample's box in the colour `fill` (C levels)."""
    colour = send(torch.tensor(fill, dtype=torch.uint8), images_BCHW.device).view(1, -1, 1, 1)

    def paint(images: Tensor, chosen: Tensor) -> Tensor:
        top, left, height, width = send(boxes_B4[chosen], images.device)[:, :, None].unbind(1)
        row, column = (torch.arange(length, device=images.device) for length in images.shape[2:])
        rows = (row >= top) & (row < top + height)
        columns = (column >= left) & (column < left + width)
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], colour, images)

    return _change_some(images_BCHW, boxes_B4[:, 2] > 0, paint)


# Shared --------------------------------------------------------------------------------------------


def _change_some(images_BCHW: Tensor, chosen_B: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`change(images, indices)` applied to the chosen samples alone (bool, on the CPU).

    Rows are picked with index_select: on a CPU it copies whole rows, twenty times faster than indexing.
    """
    chosen = chosen_B.nonzero().flatten()  # on the CPU, so that no device is waited for
    place = torch.arange(len(chosen_B))
    place[chosen] = len(chosen_B) + torch.arange(len(chosen))
    changed = change(images_BCHW.index_select(0, send(chosen, images_BCHW.device)), chosen)
    both = images_BCHW.new_empty((len(chosen_B) + len(chosen), *images_BCHW.shape[1:]))
    for part, images in zip(both.split([len(chosen_B), len(chosen)]), (images_BCHW, changed), strict=True):
        part.copy_(images)  # on a CPU by all threads, unlike torch.cat
    return both.index_select(0, send(place, images_BCHW.device))


def _blend(images_BCHW: Tensor, others: Tensor, shares_B111: Tensor) -> Tensor:
    """Each sample's share of its image and the rest of the other, cut to levels; shares above 1 lead away."""
    blended = torch.lerp(others.float(), images_BCHW.float(), shares_B111)
    return blended.clamp_(0, 255).to(torch.uint8)


def _gather(pixels_BCQ: Tensor, source_BP: Tensor) -> Tensor:
    """(B,C,P): pixel `source_BP[b, p]` of image b, for every place p = row * W + column."""
    return pixels_BCQ.gather(2, source_BP[:, None].expand(-1, pixels_BCQ.shape[1], -1))


def _reflect(position: Tensor, length: int) -> Tensor:
    """Positions beyond 0 .. length - 1 folded back, the edge pixel not repeated."""
    last = length - 1
    return last - (position % (2 * last) - last).abs()


def _box_coordinates(start_B: Tensor, size_B: Tensor, length: int) -> Tensor:
    """Where the `length` output pixels lie on one axis, in grid_sample's [-1, 1].

    Held inside the box: its neighbours must not bleed in at the edges.
    """
    centre = (torch.arange(length, device=start_B.device) + 0.5) * (size_B[:, None] / length) - 0.5
    pixel = start_B[:, None] + centre.clamp(min=0).minimum(size_B[:, None] - 1)
    return (2 * pixel + 1) / length - 1


def _draw_within(limit: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform over [-limit, limit]."""
    return limit * (2 * torch.rand(shape, generator=generator) - 1)


def _draw_areas(
    n_images: int,
    whole: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Areas in pixels, uniform, and aspect ratios, log-uniform: both (B, TRIES) float64."""
    u, v = torch.rand(2, n_images, TRIES, generator=generator, dtype=torch.float64)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    return whole * (scale[0] + u * (scale[1] - scale[0])), (low + v * (high - low)).exp()


def _first_fit(
    heights: Tensor, widths: Tensor, fits: Tensor, fallback: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(B,2) int64: height and width of the first try that fits, or `fallback`; and (B,) whether one did."""
    first = fits.byte().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    size = torch.cat([heights.gather(1, first), widths.gather(1, first)], dim=1).long()
    return torch.where(found[:, None], size, torch.tensor(fallback)), found


def _draw_corners(room_B2: Tensor, generator: torch.Generator) -> Tensor:
    """(B,2) int64, uniform over 0 .. room inclusive."""
    return (torch.rand(room_B2.shape, generator=generator, dtype=torch.float64) * (room_B2 + 1)).long()
