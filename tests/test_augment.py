"""Augmentation: torchvision's pixels and distributions, sample by sample, from stateless draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms
from torchvision.transforms import autoaugment, v2
from torchvision.transforms.v2 import functional as F

from src.config import AugmentConfig
from src.data import augment as aug

FILL = (124, 116, 104)
EVERYTHING = AugmentConfig(
    flip=0.5,
    crop_padding=4,
    crop_scale=(0.5, 1.0),
    rotation=30.0,
    rotation_p=0.5,
    jitter=0.4,
    hue=0.1,
    randaugment_ops=2,
    randaugment_magnitude=9,
    trivial_augment=True,
    erasing=0.5,
    cutout=6,
)
SIZES = [(24, 24), (20, 33)]
RAND, TRIVIAL = v2.RandAugment(), v2.TrivialAugmentWide()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(n: int = 8, height: int = 24, width: int = 24, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=seeded(9))


def varied_images(height: int, width: int) -> torch.Tensor:
    """Noise, smooth, dim, grey, constant and two-level images, all different from each other."""
    noise = random_images(3, height, width)
    ramp = torch.linspace(0, 255, width).expand(3, height, width).byte()
    flat = torch.full((3, height, width), 77, dtype=torch.uint8)
    black, white = torch.zeros_like(flat), torch.full_like(flat, 255)
    grey = noise[0, :1].expand(3, -1, -1)
    two_level = (noise[1] > 128).byte() * 200
    dim, half_ramp = noise[1] // 4 + 90, ramp.flip(-1) // 2
    return torch.stack([noise[0], dim, ramp, half_ramp, flat, black, white, grey, two_level])


def all_codes() -> list[int]:
    return [2 * i + sign for i, op in enumerate(aug.OPS) for sign in range(1 + (op in aug.SIGNED))]


# RandAugment


def torchvision_v2(transform: v2.Transform, images: torch.Tensor, code: int, magnitude: int) -> torch.Tensor:
    """What `transform` makes of image(s) when it draws this op, sign and bin."""
    op = tuple(aug.OPS)[code // 2]
    scale, signed = transform._AUGMENTATION_SPACE[op]
    levels = scale(transform.num_magnitude_bins, *images.shape[-2:])
    level = 0.0 if levels is None else float(levels[magnitude]) * (-1 if code % 2 else 1)
    assert signed or code % 2 == 0
    return transform._apply_image_or_video_transform(
        images, op, level, interpolation=transform.interpolation, fill=transform._fill
    )


def torchvision_v1(image: torch.Tensor, code: int, magnitude: int) -> torch.Tensor:
    op = tuple(aug.OPS)[code // 2]
    levels, _ = autoaugment.RandAugment()._augmentation_space(31, image.shape[-2:])[op]
    level = levels[magnitude].item() * (-1 if code % 2 else 1) if levels.ndim else 0.0
    return autoaugment._apply_op(image, op, level, transforms.InterpolationMode.NEAREST, None)


@pytest.mark.parametrize("transform", [RAND, TRIVIAL])
def test_ops_are_torchvisions(transform):
    space = transform._AUGMENTATION_SPACE
    assert set(aug.OPS) == set(space) and transform.num_magnitude_bins == aug.BINS
    assert {op for op, (_, signed) in space.items() if signed} == set(aug.SIGNED)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("magnitude", [0, 2, 9, 18, 20, 30])
def test_every_op_and_sign_equals_torchvision(size, magnitude):
    images, codes = varied_images(*size), all_codes()
    batch = images.repeat(len(codes), 1, 1, 1)
    batch_codes = torch.tensor(codes).repeat_interleave(len(images))
    shuffle = torch.randperm(len(batch), generator=seeded())
    result = torch.empty_like(batch)
    result[shuffle] = aug.rand_augment(batch[shuffle], batch_codes[shuffle], magnitude)
    for image, code, ours in zip(batch, batch_codes.tolist(), result, strict=True):
        assert ours.equal(torchvision_v2(RAND, image, code, magnitude)), (code, magnitude)


@pytest.mark.parametrize("size", [*SIZES, (3, 3), (2, 5), (5, 2), (1, 1)])
@pytest.mark.parametrize("factor", [0.0, 0.1, 0.73, 1.0, 1.9])
def test_sharpness_is_torchvision_s(size, factor):
    images = varied_images(*size)
    before = images.clone()
    assert aug._sharpness(images, factor).equal(F.adjust_sharpness(images, factor))
    assert images.equal(before)


@pytest.mark.parametrize("code", all_codes())
def test_study_version_of_torchvision(code):
    """The study used v1, of which some colour ops round differently, by one level."""
    images = varied_images(24, 24)
    ours = aug.rand_augment(images, torch.full((len(images),), code), 9).int()
    theirs = torch.stack([torchvision_v1(image, code, 9) for image in images]).int()
    assert (ours - theirs).abs().max() <= (0 if tuple(aug.OPS)[code // 2] in aug.MOVES else 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_does_not_depend_on_its_batch(channels):
    images = random_images(40, channels=channels)
    codes = aug.draw_codes(40, seeded())
    batched = aug.rand_augment(images, codes, 9)
    alone = [aug.rand_augment(images[i : i + 1], codes[i : i + 1], 9) for i in range(40)]
    assert batched.equal(torch.cat(alone))


def test_codes_are_uniform():
    codes = aug.draw_codes(28_000, seeded())
    ops = torch.bincount(codes // 2, minlength=14)
    assert len(ops) == 14 and stats.chisquare(ops).pvalue > 0.01
    for i, op in enumerate(aug.OPS):
        signs = torch.bincount(codes[codes // 2 == i] % 2, minlength=2)
        assert stats.chisquare(signs).pvalue > 0.01 if op in aug.SIGNED else signs[1] == 0


def test_slots_draw_their_own_ops():
    images = random_images(64)
    one = aug.augment(images, AugmentConfig(randaugment_ops=1), seeded(), FILL)
    two = aug.augment(images, AugmentConfig(randaugment_ops=2), seeded(), FILL)
    generator = seeded()
    expected = images
    for slot in range(2):
        expected = aug.rand_augment(expected, aug.draw_codes(64, generator), 9)
        assert expected.equal((one, two)[slot])


# TrivialAugment


@pytest.mark.parametrize("size", [*SIZES, (48, 40)])
def test_every_op_sign_and_bin_equals_torchvision_s_trivial_augment(size):
    """All of them shuffled into one batch; the largest image is wider than the longest translation."""
    images, bins = varied_images(*size), torch.arange(31)
    pairs = torch.cartesian_prod(torch.tensor(all_codes()), bins)
    batch = images.repeat(len(pairs), 1, 1, 1)
    codes, bins = pairs.repeat_interleave(len(images), dim=0).unbind(1)
    before, shuffle = batch.clone(), torch.randperm(len(batch), generator=seeded())
    result = torch.empty_like(batch)
    result[shuffle] = aug.trivial_augment(batch[shuffle], codes[shuffle], bins[shuffle])
    for (code, bin_), ours in zip(pairs.tolist(), result.split(len(images)), strict=True):
        assert ours.equal(torchvision_v2(TRIVIAL, images, code, bin_)), (code, bin_)
    assert batch.equal(before)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_s_trivial_augment_does_not_depend_on_its_batch(channels):
    images, codes = random_images(60, channels=channels), aug.draw_codes(60, seeded())
    bins = torch.randint(31, (60,), generator=seeded(1))
    batched = aug.trivial_augment(images, codes, bins)
    rows = [slice(i, i + 1) for i in range(60)]
    alone = [aug.trivial_augment(images[i], codes[i], bins[i]) for i in rows]
    assert batched.equal(torch.cat(alone))


def test_strengths_are_uniform_whatever_the_op(monkeypatch):
    drawn = []
    monkeypatch.setattr(aug, "trivial_augment", lambda images, *draws: drawn.append(draws) or images)
    images = random_images(1, 1, 1).expand(14_000, -1, -1, -1)
    aug.augment(images, AugmentConfig(trivial_augment=True), seeded(), FILL)
    [(codes, bins)] = drawn
    assert len(codes) == 14_000 and bins.min() == 0 and bins.max() == 30
    table = torch.bincount(codes // 2 * 31 + bins, minlength=14 * 31)
    assert len(table) == 14 * 31 and stats.chisquare(table).pvalue > 0.01
    signs = torch.bincount(codes[codes // 2 == tuple(aug.OPS).index("Rotate")] % 2, minlength=2)
    assert stats.chisquare(signs).pvalue > 0.01


# Crops and flips


def test_crop_boxes_follow_torchvision():
    height, width, n = 48, 64, 1500
    ours = aug.draw_crops(n, height, width, (0.1, 1.0), seeded())
    torch.manual_seed(1)
    image = torch.zeros(3, height, width)
    get_params = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([get_params(image, [0.1, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    _assert_same_distribution(ours, theirs)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()


@pytest.mark.parametrize("size", [(24, 24), (20, 60), (60, 20)])
def test_crop_falls_back_to_the_centre(size):
    # A crop of 150 % of the area fits nowhere, so that both sides take their fallback.
    expected = transforms.RandomResizedCrop.get_params(torch.zeros(3, *size), [1.5, 1.5], [3 / 4, 4 / 3])
    assert aug.draw_crops(3, *size, (1.5, 1.5), seeded()).tolist() == [list(expected)] * 3


@pytest.mark.parametrize("size", SIZES)
def test_resized_crop_equals_torchvision(size):
    images = random_images(64, *size)
    boxes = aug.draw_crops(64, *size, (0.05, 1.0), seeded())
    boxes[0] = torch.tensor([0, 0, *size])
    ours = aug.resized_crop(images, boxes)
    theirs = [
        F.resized_crop(image, *box, list(size), antialias=False)
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    assert (ours.int() - torch.stack(theirs).int()).abs().max() <= 1
    assert ours[0].equal(images[0])


def test_shift_is_a_window_of_the_reflected_image():
    images = random_images(49, 12, 17)
    offsets = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    padded = F.pad(images, [3, 3, 3, 3], padding_mode="reflect")
    for ours, image, (down, right) in zip(aug.shift(images, offsets), padded, offsets.tolist(), strict=True):
        assert ours.equal(image[:, 3 + down : 15 + down, 3 + right : 20 + right])


def test_pad_and_crop_draws_every_offset():
    image = torch.arange(144, dtype=torch.uint8).view(1, 1, 12, 12)
    out = aug.augment(image.expand(900, -1, -1, -1), AugmentConfig(crop_padding=1), seeded(), (0,))
    offsets = out[:, 0, 5, 5].long() - image[0, 0, 5, 5]
    rows, columns = (offsets + 13) // 12 - 1, (offsets + 13) % 12 - 1
    counts = torch.bincount((rows + 1) * 3 + columns + 1, minlength=9)
    assert len(counts) == 9 and stats.chisquare(counts).pvalue > 0.01


def test_flip():
    images = random_images(400)
    chosen = torch.rand(400, generator=seeded()) < 0.3
    out = aug.flip(images, chosen)
    assert out[chosen].equal(F.horizontal_flip(images[chosen])) and out[~chosen].equal(images[~chosen])
    assert aug.augment(images, AugmentConfig(flip=1.0), seeded(), FILL).equal(images.flip(-1))
    some = aug.augment(images, AugmentConfig(flip=0.3), seeded(), FILL)
    n_flipped = int((some == images.flip(-1)).flatten(1).all(1).sum())
    assert stats.binomtest(n_flipped, 400, 0.3).pvalue > 0.01


# Rotation


def degrees(n: int) -> torch.Tensor:
    """`n` angles, with the right ones among them."""
    right = torch.tensor([0.0, 90.0, -90.0, 180.0, 45.0, -45.0, 1e-3])
    return torch.cat([right, 180 * (2 * torch.rand(n, generator=seeded(5)) - 1)])[:n]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [*SIZES, (33, 20), (64, 64)])
def test_rotation_is_torchvision_s_inside_the_image(size, channels):
    """To within one level; where no neighbour is inside it is the colour, also to the level."""
    images, angles = random_images(40, *size, channels), degrees(40)
    ours = aug.rotate(images, angles, torch.ones(40, dtype=torch.bool), FILL[:channels])
    n_inside = n_outside = 0
    for image, angle, turned in zip(images, angles.tolist(), ours, strict=True):
        kind = {"interpolation": transforms.InterpolationMode.BILINEAR, "fill": list(FILL[:channels])}
        theirs = v2.RandomRotation((angle, angle), **kind)(image)
        share = F.rotate(torch.ones(1, *size), angle, interpolation=kind["interpolation"])
        inside, outside = (share > 1 - 1e-5).expand_as(image), (share < 1e-5).expand_as(image)
        assert (turned[inside].int() - theirs[inside].int()).abs().max() <= 1
        assert turned[outside].equal(theirs[outside])
        n_inside, n_outside = n_inside + int(inside.sum()), n_outside + int(outside.sum())
    assert n_inside > 0.6 * ours.numel() and n_outside > 0.05 * ours.numel()


@pytest.mark.parametrize("size", SIZES)
def test_a_turned_image_is_that_of_one_padded_with_the_colour(size):
    """Every pixel, those on the border too: torchvision's, with a border so wide that none is cut."""
    images, angles = random_images(40, *size), degrees(40)
    ours = aug.rotate(images, angles, torch.ones(40, dtype=torch.bool), FILL)
    padded = F.pad(images, [30] * 4, fill=list(FILL))
    for image, angle, turned in zip(padded, angles.tolist(), ours, strict=True):
        theirs = F.rotate(image, angle, interpolation=transforms.InterpolationMode.BILINEAR)
        assert (turned.int() - F.center_crop(theirs, list(size)).int()).abs().max() <= 1


def test_rotation_leaves_what_is_not_chosen_or_not_turned():
    images, nobody = random_images(30, 20, 33), torch.zeros(30, dtype=torch.bool)
    before, some = images.clone(), torch.arange(30) % 3 == 1
    angles = 10 + degrees(30).abs().clamp(max=70)
    turned = aug.rotate(images, angles, some, FILL)
    changed = (turned != images).flatten(1).any(1)
    assert changed.equal(some) and turned.dtype == torch.uint8 and turned.shape == images.shape
    alone = [aug.rotate(images[i : i + 1], angles[i : i + 1], ~nobody[:1], FILL) for i in range(1, 30, 3)]
    assert turned[some].equal(torch.cat(alone))
    assert aug.rotate(images, angles, nobody, FILL).equal(images)
    assert aug.rotate(images, torch.zeros(30), ~nobody, FILL).equal(images)
    assert aug.rotate(images[:0], angles[:0], nobody[:0], FILL).shape == (0, 3, 20, 33)
    assert images.equal(before)


def test_angles_are_uniform_and_as_many_as_the_probability_says(monkeypatch):
    drawn = []
    monkeypatch.setattr(aug, "rotate", lambda images, *draws: drawn.append(draws) or images)
    images = random_images(1, 1, 1).expand(4000, -1, -1, -1)
    aug.augment(images, AugmentConfig(rotation=25.0, rotation_p=0.3), seeded(), FILL)
    aug.augment(images, AugmentConfig(rotation=180.0), seeded(1), FILL)
    for (angles, chosen, fill), limit, p in zip(drawn, (25, 180), (0.3, 1), strict=True):
        assert stats.kstest(angles.numpy(), stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.01
        assert stats.kstest(angles[chosen].numpy(), stats.uniform(-limit, 2 * limit).cdf).pvalue > 0.01
        assert stats.binomtest(int(chosen.sum()), 4000, p).pvalue > 0.01 and fill == FILL


# Colour jitter

CHANGES = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
FACTORS = (0.0, 0.2, 0.5, 0.73, 0.999, 1.0, 1.31, 1.5, 2.0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("which", range(3))
def test_each_change_of_colour_is_torchvision_s(which, channels):
    """Within one level, every image by each factor, shuffled into one batch; the other factors are 1."""
    images = varied_images(20, 33)[:, :channels]
    batch, factors = images.repeat(len(FACTORS), 1, 1, 1), torch.ones(3, len(FACTORS) * len(images))
    factors[which] = torch.tensor(FACTORS).repeat_interleave(len(images))
    before, shuffle = batch.clone(), torch.randperm(len(batch), generator=seeded())
    result = torch.empty_like(batch)
    result[shuffle] = aug.jitter(batch[shuffle], factors[:, shuffle])
    for image, factor, ours in zip(batch, factors[which].tolist(), result, strict=True):
        assert (ours.int() - CHANGES[which](image, factor).int()).abs().max() <= 1, factor
    ones = factors[which] == 1
    assert result[ones].equal(batch[ones]) and not result[~ones].equal(batch[~ones]) or channels == 1
    assert batch.equal(before)


def test_jitter_changes_brightness_then_contrast_then_saturation():
    images, factors = varied_images(24, 24), 0.5 + torch.rand(3, 9, generator=seeded())
    one_by_one = images
    for which in range(3):
        alone = torch.ones(3, 9)
        alone[which] = factors[which]
        one_by_one = aug.jitter(one_by_one, alone)
    assert aug.jitter(images, factors).equal(one_by_one)


def test_hue_is_torchvision_s():
    """Within one level, of every mixture of 18 levels by every shift in one batch."""
    levels = torch.arange(0, 256, 15, dtype=torch.uint8)
    image = torch.cartesian_prod(levels, levels, levels).T.reshape(3, 54, -1)
    shifts = torch.cat([torch.linspace(-0.5, 0.5, 13), torch.tensor([0.0, 1 / 7, 1e-4])])
    batch = image.expand(len(shifts), -1, -1, -1)
    ours = aug.shift_hue(batch, shifts)
    assert ours.dtype == torch.uint8 and batch.equal(image.expand_as(batch))
    for turned, shift in zip(ours, shifts.tolist(), strict=True):
        assert (turned.int() - F.adjust_hue(image, shift).int()).abs().max() <= 1, shift
    assert ours[13].equal(image)


def test_grey_has_no_hue_and_one_channel_no_saturation():
    images = random_images(12, channels=1)
    shifts, factors = torch.linspace(-0.5, 0.5, 12), torch.ones(3, 12)
    factors[2] = torch.linspace(0, 2, 12)
    assert aug.shift_hue(images, shifts).equal(images) and aug.jitter(images, factors).equal(images)
    grey = images.expand(-1, 3, -1, -1)
    assert aug.shift_hue(grey, shifts).equal(grey)
    out = aug.augment(images, AugmentConfig(rotation=20.0, jitter=0.4, hue=0.1), seeded(), FILL[:1])
    assert out.shape == images.shape and out.dtype == torch.uint8 and not out.equal(images)


def test_factors_and_shifts_are_uniform(monkeypatch):
    """Each of its own range, and drawn each for itself."""
    drawn = []
    for name in ("jitter", "shift_hue"):
        monkeypatch.setattr(aug, name, lambda images, values: drawn.append(values) or images)
    images = random_images(1, 1, 1).expand(4000, -1, -1, -1)
    aug.augment(images, AugmentConfig(jitter=0.4, hue=0.07), seeded(), FILL)
    factors, shifts = drawn
    assert factors.shape == (3, 4000) and shifts.shape == (4000,)
    for values in factors:
        assert stats.kstest(values.numpy(), stats.uniform(0.6, 0.8).cdf).pvalue > 0.01
    assert stats.kstest(shifts.numpy(), stats.uniform(-0.07, 0.14).cdf).pvalue > 0.01
    correlations = np.corrcoef(torch.cat([factors, shifts[None]]).numpy())
    assert np.abs(correlations - np.eye(4)).max() < 0.06


# Chosen samples


def some_chosen(which: str, n: int) -> torch.Tensor:
    every_third = torch.arange(n) % 3 == 1
    return {"none": torch.zeros(n), "some": every_third, "all": torch.ones(n)}[which].bool()


@pytest.mark.parametrize("n", [30, 1, 0])
@pytest.mark.parametrize("which", ["none", "some", "all"])
def test_flip_and_erase_change_the_chosen_alone(which, n):
    images = random_images(30, 20, 33)[:n]
    before, chosen = images.clone(), some_chosen(which, n)
    boxes = aug.draw_erasures(30, 20, 33, 1.0, seeded())[:n] * chosen[:, None]
    colour = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    flipped, erased = aug.flip(images, chosen), aug.erase(images, boxes, FILL)
    for i, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
        assert flipped[i].equal(image.flip(-1) if chosen[i] else image)
        assert erased[i].equal(F.erase(image, *box, colour) if chosen[i] else image)
        assert not chosen[i] or not (flipped[i].equal(image) or erased[i].equal(image))
    for out in (flipped, erased):
        assert out.dtype == torch.uint8 and out.shape == images.shape
    assert images.equal(before)


def test_an_empty_selection_is_still_shown():
    """`change` sees no images, in their shape, rather than being left out: nothing has to be known of it."""
    images, seen = random_images(5), []
    nobody = torch.zeros(5, dtype=torch.bool)
    out = aug._change_some(images, nobody, lambda some, which: seen.append((some.shape, len(which))) or some)
    assert out.equal(images) and seen == [((0, 3, 24, 24), 0)]


# Erasing


def test_erased_boxes_follow_torchvision():
    height, width, n = 48, 64, 1500
    ours = aug.draw_erasures(n, height, width, 1.0, seeded())
    torch.manual_seed(1)
    image = torch.zeros(3, height, width)
    get_params = transforms.RandomErasing.get_params
    theirs = torch.tensor([get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(n)])
    _assert_same_distribution(ours, theirs)
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()


def test_erasing_probability():
    erased = aug.draw_erasures(2000, 24, 24, 0.15, seeded())[:, 2:].prod(1) > 0
    assert stats.binomtest(int(erased.sum()), 2000, 0.15).pvalue > 0.01


def test_impossible_rectangles_are_left_out():
    # In one row of pixels no rectangle is lower than the image: torchvision returns it unchanged.
    assert (aug.draw_erasures(50, 1, 64, 1.0, seeded())[:, 2:] == 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_erase_paints_the_box_and_nothing_else(size):
    images = random_images(30, *size)
    boxes = aug.draw_erasures(30, *size, 0.7, seeded())
    colour = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    for ours, image, box in zip(aug.erase(images, boxes, FILL), images, boxes.tolist(), strict=True):
        assert ours.equal(F.erase(image, *box, colour))


# Cutout


def square_spans(length: int, side: int) -> list[tuple[int, int]]:
    """First pixel and number of pixels of a square's shadow on an axis, by the pixel of its centre."""
    spans = []
    for centre in range(length):
        inside = [p for p in range(centre - side // 2, centre - side // 2 + side) if 0 <= p < length]
        spans.append((inside[0], len(inside)))
    return spans


@pytest.mark.parametrize("side", [1, 2, 5, 6])
def test_cutouts_have_their_centre_anywhere(side):
    """Every pixel is equally often the centre, the squares cut off at the edges (no centre is ambiguous)."""
    height, width, n = 7, 9, 63 * 60
    rows, columns = square_spans(height, side), square_spans(width, side)
    boxes = aug.draw_cutouts(n, height, width, side, seeded())
    assert boxes.dtype == torch.int64 and boxes.shape == (n, 4)
    counts = np.zeros((height, width), int)
    for top, left, box_height, box_width in boxes.tolist():
        counts[rows.index((top, box_height)), columns.index((left, box_width))] += 1
    assert counts.sum() == n and stats.chisquare(counts.ravel()).pvalue > 0.01


@pytest.mark.parametrize("side", [2, 8, 12])
def test_cutout_boxes_are_those_of_its_authors(side):
    """DeVries & Taylor's code: `clip(y - length // 2, 0, h)` to `clip(y + length // 2, 0, h)`."""
    boxes = aug.draw_cutouts(500, 20, 33, side, seeded())
    for length, start, size in zip((20, 33), boxes[:, :2].T, boxes[:, 2:].T, strict=True):
        theirs = {
            (int(np.clip(y - side // 2, 0, length)), int(np.clip(y + side // 2, 0, length)))
            for y in range(length)
        }
        assert set(zip(start.tolist(), (start + size).tolist(), strict=True)) == theirs


def test_a_cutout_larger_than_the_image_covers_it():
    assert aug.draw_cutouts(200, 20, 33, 66, seeded()).tolist() == [[0, 0, 20, 33]] * 200


@pytest.mark.parametrize("size", SIZES)
def test_cutout_paints_its_square_in_every_image_and_nothing_else(size):
    images = random_images(200, *size) // 2  # no level of which is as bright as the colour
    colour = torch.tensor([200, 201, 202], dtype=torch.uint8)[:, None, None]
    out = aug.augment(images, AugmentConfig(cutout=6), seeded(2), (200, 201, 202))
    n_painted = []
    for ours, image, box in zip(
        out, images, aug.draw_cutouts(200, *size, 6, seeded(2)).tolist(), strict=True
    ):
        assert ours.equal(F.erase(image, *box, colour))
        n_painted.append(int((ours == colour).all(0).sum()))
    assert min(n_painted) >= 9 and max(n_painted) == 36


# Mixing

N_CLASSES = 5
LABELS = torch.tensor([0, 1, 2, 3, 3, 1])  # an image is mixed with the one before it: 3 with 3 once


def mixed_by(config: AugmentConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six images without equal pixels, and what mixing makes of them and of `LABELS`."""
    images, labels = torch.randn(6, 3, 16, 20, generator=seeded(4)), LABELS.clone()
    before = images.clone()
    torch.manual_seed(seed)
    mixed, probabilities = aug.mixing(config, N_CLASSES)(images, labels)
    assert images.equal(before) and labels.equal(LABELS)
    return images, mixed, probabilities


def assert_blended(mixed: torch.Tensor, images: torch.Tensor, share: float) -> None:
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))


def assert_labels(probabilities_BK: torch.Tensor, share: float) -> None:
    """Distributions that give `share` to an image's own class and the rest to the one before it."""
    own_BK = torch.eye(N_CLASSES)[LABELS]
    assert_blended(probabilities_BK, own_BK, share)
    assert (probabilities_BK >= 0).all()
    torch.testing.assert_close(probabilities_BK.sum(1), torch.ones(6))


def test_without_mixup_and_cutmix_nothing_is_mixed():
    assert aug.mixing(EVERYTHING, N_CLASSES) is None


def test_mixup_blends_images_and_labels_alike():
    """By λ and 1 - λ, λ from Beta(α, α) with the α of the config."""
    shares = []
    for seed in range(300):
        images, mixed, probabilities = mixed_by(AugmentConfig(mixup=0.4), seed)
        shares.append(probabilities[0, 0].item())
        assert_blended(mixed, images, shares[-1])
        assert_labels(probabilities, shares[-1])
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01


def test_cutmix_pastes_a_rectangle_and_labels_follow_its_area():
    shares = []
    for seed in range(300):
        images, mixed, probabilities = mixed_by(AugmentConfig(cutmix=0.4), seed)
        pasted_BHW = (mixed != images).any(1)
        assert (pasted_BHW == pasted_BHW[0]).all()
        assert mixed.equal(torch.where(pasted_BHW[:, None], images.roll(1, 0), images))
        rows, columns = (pasted_BHW[0].any(axis).nonzero() for axis in (1, 0))
        area = pasted_BHW[0].sum().item()
        assert area == 0 or area == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        shares.append(1 - area / (16 * 20))
        assert_labels(probabilities, shares[-1])
    torch.manual_seed(0)
    cutmix = v2.CutMix(alpha=0.4, num_classes=N_CLASSES)
    theirs = [cutmix(images, LABELS)[1][0, 0].item() for _ in range(3000)]
    assert stats.ks_2samp(np.round(shares, 5), np.round(theirs, 5)).pvalue > 0.01


def test_with_mixup_and_cutmix_each_batch_takes_one_of_them():
    n_pasted = 0
    for seed in range(200):
        images, mixed, probabilities = mixed_by(AugmentConfig(mixup=1.0, cutmix=1.0), seed)
        share = probabilities[0, 0].item()
        assert_labels(probabilities, share)
        if ((mixed == images) | (mixed == images.roll(1, 0))).all():
            n_pasted += 1
        else:
            assert_blended(mixed, images, share)
    assert stats.binomtest(n_pasted, 200, 0.5).pvalue > 0.01


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_mixing_is_decided_by_torch_s_seed(alphas):
    config = AugmentConfig(mixup=alphas[0], cutmix=alphas[1])
    (_, *first), (_, *again), (_, *other) = (mixed_by(config, seed) for seed in (3, 3, 4))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(first, other, strict=True))


# The whole


def test_identity_changes_nothing():
    images = random_images()
    assert AugmentConfig().is_identity
    assert aug.augment(images, AugmentConfig(), seeded(), FILL).equal(images)


@pytest.mark.parametrize(
    "off", [AugmentConfig(), AugmentConfig(rotation_p=0.5), AugmentConfig(rotation=9.0, rotation_p=0.0)]
)
def test_nothing_is_drawn_for_what_is_off(off):
    """So a field that is added changes no run that leaves it off."""
    generator = seeded(7)
    assert aug.augment(random_images(), off, generator, FILL).equal(random_images())
    assert generator.get_state().equal(seeded(7).get_state())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [1, 2, 33])
def test_contract(n, size):
    images = random_images(n, *size)
    before = images.clone()
    out = aug.augment(images, EVERYTHING, seeded(3), FILL)
    assert (out.dtype, out.shape, out.device) == (images.dtype, images.shape, images.device)
    assert images.equal(before)
    assert out.equal(aug.augment(images, EVERYTHING, seeded(3), FILL))
    assert not out.equal(aug.augment(images, EVERYTHING, seeded(4), FILL))


def test_draws_ignore_global_randomness():
    images = random_images()
    torch.manual_seed(0)
    out = aug.augment(images, EVERYTHING, seeded(), FILL)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert out.equal(aug.augment(images, EVERYTHING, seeded(), FILL))
    torch.manual_seed(0)
    assert state.equal(torch.get_rng_state())


def test_order_is_crop_shift_flip_rotate_jitter_randaugment_trivialaugment_erase_cut_out():
    images, generator = random_images(40), seeded(5)
    out = aug.resized_crop(images, aug.draw_crops(40, 24, 24, (0.5, 1.0), generator))
    out = aug.shift(out, torch.randint(9, (40, 2), generator=generator) - 4)
    out = aug.flip(out, torch.rand(40, generator=generator) < 0.5)
    turned = torch.rand(40, generator=generator) < 0.5
    out = aug.rotate(out, 30 * (2 * torch.rand(40, generator=generator) - 1), turned, FILL)
    out = aug.jitter(out, 1 + 0.4 * (2 * torch.rand((3, 40), generator=generator) - 1))
    out = aug.shift_hue(out, 0.1 * (2 * torch.rand(40, generator=generator) - 1))
    for _ in range(2):
        out = aug.rand_augment(out, aug.draw_codes(40, generator), 9)
    bins = torch.randint(31, (40,), generator=generator)
    out = aug.trivial_augment(out, aug.draw_codes(40, generator), bins)
    out = aug.erase(out, aug.draw_erasures(40, 24, 24, 0.5, generator), FILL)
    out = aug.erase(out, aug.draw_cutouts(40, 24, 24, 6, generator), FILL)
    assert out.equal(aug.augment(images, EVERYTHING, seeded(5), FILL))


def test_nothing_reads_the_device():
    """A meta tensor has no values: whatever needed one on the host (`.item()`, `nonzero`) would fail."""
    images = random_images().to("meta")
    out = aug.augment(images, EVERYTHING, seeded(), FILL)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.uint8, images.shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_cuda():
    images = random_images(64)
    config = AugmentConfig(flip=0.5, crop_padding=4, erasing=0.5, cutout=6)
    expected = aug.augment(images, config, seeded(), FILL)
    assert aug.augment(images.cuda(), config, seeded(), FILL).cpu().equal(expected)
    codes = torch.arange(2 * len(aug.MOVES)).repeat(4)[:32]
    moved = aug.rand_augment(images[:32].cuda(), codes, 9)
    assert moved.cpu().equal(aug.rand_augment(images[:32], codes, 9))
    config = AugmentConfig(rotation=20.0, rotation_p=0.7)
    expected = aug.augment(images, config, seeded(), FILL)
    turned = aug.augment(images.cuda(), config, seeded(), FILL).cpu()
    assert (turned.int() - expected.int()).abs().max() <= 1


def test_corners_reach_every_place():
    corners = aug._draw_corners(torch.tensor([[3, 0]]).expand(2000, -1), seeded())
    counts = torch.bincount(corners[:, 0], minlength=4)
    assert len(counts) == 4 and stats.chisquare(counts).pvalue > 0.01 and (corners[:, 1] == 0).all()


def _assert_same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Kolmogorov-Smirnov on top, left, height, width, area and aspect ratio."""
    for boxes in zip(_statistics(ours), _statistics(theirs), strict=True):
        assert stats.ks_2samp(*boxes).pvalue > 0.01


def _statistics(boxes: torch.Tensor) -> list[torch.Tensor]:
    top, left, height, width = boxes.double().unbind(1)
    return [top, left, height, width, height * width, height / width]
