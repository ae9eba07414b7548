"""Batches and preprocessing: each example once, any step again alone, pixels as Pillow resizes them."""

from __future__ import annotations

import mmap
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms.v2 import functional as F

from src.config import AugmentConfig
from src.data import batches as batches_module
from src.data.augment import augment
from src.data.batches import Batches, Preprocess, balanced_order, derived_seed, sent_in_parts, to_device

CPU = torch.device("cpu")
PREPROCESS = Preprocess(24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")
RECIPE = AugmentConfig(flip=0.5, crop_padding=2, randaugment_ops=2, erasing=0.5)


def numbered(n: int, batch_size: int) -> Batches:
    """Rows that hold their own number; the split is every third of them, backwards."""
    rows = np.arange(3 * n, dtype=np.float32)[:, None]
    return Batches(rows, np.arange(3 * n) % 7, np.arange(0, 3 * n, 3)[::-1].copy(), batch_size, CPU)


def augmented(n: int = 12, batch_size: int = 5) -> Batches:
    rows, labels_N = tiny.images(n)
    return Batches(rows, labels_N, np.arange(n), batch_size, CPU, PREPROCESS, RECIPE)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 200), batch_size=st.integers(2, 70), epoch=st.integers(0, 3))
def test_an_epoch_covers_each_example_once_in_even_steps(n, batch_size, epoch):
    batches = numbered(n, batch_size)
    steps = list(batches.epoch(0, epoch))
    rows = torch.cat([inputs for inputs, _ in steps])[:, 0].long()
    labels = torch.cat([labels_B for _, labels_B in steps])
    sizes = [len(labels_B) for _, labels_B in steps]
    assert sorted(rows.tolist()) == sorted(batches.index_M.tolist())
    assert torch.equal(labels, rows % 7)
    assert len(steps) == len(batches) and max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert sum(sizes) == batches.n_examples == n


@pytest.mark.parametrize("batch_size", [2, 5, 97])
def test_in_order_keeps_the_order_of_the_split(batch_size):
    batches = numbered(31, batch_size)
    rows = torch.cat([inputs for inputs, _ in batches.in_order()])[:, 0]
    assert rows.tolist() == batches.index_M.tolist()


def test_orders_differ_by_seed_and_epoch():
    def order(seed, epoch):
        return tuple(torch.cat([x for x, _ in numbered(40, 8).epoch(seed, epoch)])[:, 0].tolist())

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(0, 1), order(1, 0), order(1, 1)}) == 4


def test_the_same_step_is_the_same_batch_and_start_is_the_tail():
    batches = augmented()
    whole = list(batches.epoch(3, 2))
    for start in range(len(whole) + 1):
        tail = list(batches.epoch(3, 2, start))
        assert len(tail) == len(whole) - start
        for (x, y), (again_x, again_y) in zip(whole[start:], tail, strict=True):
            assert torch.equal(x, again_x) and torch.equal(y, again_y)


def test_augmentation_differs_by_seed_epoch_and_step():
    """The order of one image is always the same, so what differs is the augmentation."""
    rows, labels_N = tiny.images(1)
    rows = np.repeat(rows, 6, axis=0)
    batches = Batches(rows, labels_N.repeat(6), np.arange(6), 3, CPU, PREPROCESS, RECIPE)
    seen = [x for seed, epoch in [(0, 0), (0, 1), (1, 0)] for x, _ in batches.epoch(seed, epoch)]
    assert len(seen) == 6
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert not torch.equal(seen[0][0], seen[0][1])


def test_in_order_is_never_augmented():
    batches = augmented()
    expected = PREPROCESS(torch.from_numpy(batches.rows))
    assert torch.equal(torch.cat([x for x, _ in batches.in_order()]), expected)
    assert torch.equal(expected, torch.cat([x for x, _ in batches.in_order()]))


def test_batches_do_not_touch_global_randomness_or_the_store():
    batches = augmented()
    before, stored = torch.get_rng_state(), batches.rows.copy()
    list(batches.epoch(0, 0))
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(stored, batches.rows)


def test_resident_tensors_give_the_same_batches():
    batches = augmented()
    resident = replace(batches, rows=torch.from_numpy(batches.rows))
    for (x, y), (other_x, other_y) in zip(batches.epoch(0, 1), resident.epoch(0, 1), strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    assert to_device(batches.rows, CPU) is batches.rows


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_what_is_sent_in_parts_is_whole(tmp_path, monkeypatch, dtype):
    """Also from a read-only memory map; the last part is a short one."""
    monkeypatch.setattr(batches_module, "ROWS_AT_ONCE", 4)
    rows = np.arange(11 * 2 * 3).reshape(11, 2, 3).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    sent = sent_in_parts(np.load(tmp_path / "rows.npy", mmap_mode="r"), CPU)
    assert sent.numpy().dtype == dtype and np.array_equal(sent.numpy(), rows)


def test_derived_seeds_depend_on_every_number_and_its_place():
    seeds = [derived_seed(*numbers) for numbers in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1, 1), (0, 0, 2)]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


# ------------------------------------------------------------------------------------ balanced sampling


@st.composite
def imbalanced(draw) -> tuple[np.ndarray, np.ndarray]:
    """index_M and labels_M of one to eight classes of unequal size; rows and labels are no places."""
    counts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(sum(counts))
    return 5 * order + 2, np.repeat(np.arange(len(counts)) * 3 + 1, counts)[order]


def draws(index_M: np.ndarray, labels_M: np.ndarray, seed: int = 0) -> np.ndarray:
    return balanced_order(index_M, labels_M, len(index_M), np.random.default_rng(seed))


@settings(deadline=None, max_examples=200)
@given(data=imbalanced(), seed=st.integers(0, 9))
def test_balanced_order_takes_every_class_equally_often_and_no_image_before_its_turn(data, seed):
    index_M, labels_M = data
    before = [array.copy() for array in data]
    order_M = draws(index_M, labels_M, seed)
    assert order_M.dtype == index_M.dtype and len(order_M) == len(index_M)
    label_of = dict(zip(index_M.tolist(), labels_M.tolist(), strict=True))
    n_drawn = []
    for label in set(labels_M.tolist()):
        own = index_M[labels_M == label]
        drawn = [row for row in order_M.tolist() if label_of[row] == label]
        n_drawn.append(len(drawn))
        for start in range(0, len(drawn), len(own)):
            turn = drawn[start : start + len(own)]
            assert len(set(turn)) == len(turn)  # all of the class have come before one comes again
    assert max(n_drawn) - min(n_drawn) <= 1 and sum(n_drawn) == len(order_M)
    assert all(np.array_equal(*pair) for pair in zip(data, before, strict=True))


@settings(deadline=None, max_examples=50)
@given(n_classes=st.integers(1, 9), n=st.integers(1, 12), seed=st.integers(0, 9))
def test_balanced_order_of_balanced_data_is_a_permutation(n_classes, n, seed):
    index_M = np.arange(n_classes * n)[::-1].copy()
    assert sorted(draws(index_M, index_M % n_classes, seed)) == list(range(n_classes * n))


def test_balanced_order_is_decided_by_the_generator():
    index_M, labels_M = np.arange(60), np.repeat([0, 1, 2], [40, 15, 5])
    assert np.array_equal(draws(index_M, labels_M), draws(index_M, labels_M))
    assert len({tuple(draws(index_M, labels_M, seed)) for seed in range(20)}) == 20


def test_balanced_order_prefers_no_class_no_image_and_no_place():
    """17 draws of 3 classes: which two have a draw more, which images come, and where, is left to chance."""
    index_M, labels_M, n = np.arange(17), np.repeat([0, 1, 2], [12, 4, 1]), 900
    orders = np.stack([draws(index_M, labels_M, seed) for seed in range(n)])
    drawn = labels_M[orders]
    one_less = np.bincount(np.stack([(drawn == label).sum(1) for label in range(3)]).argmin(0), minlength=3)
    assert stats.chisquare(one_less).pvalue > 0.01
    of_the_large_class = np.bincount(orders[drawn == 0], minlength=12)
    assert stats.chisquare(of_the_large_class).pvalue > 0.01
    for place in (0, 8, 16):
        assert stats.chisquare(np.bincount(drawn[:, place], minlength=3)).pvalue > 0.01
    n_same = (drawn[:, 1:] == drawn[:, :-1]).sum()  # neighbours, as often as in any shuffled list
    assert stats.binomtest(int(n_same), n * 16, (2 * 6 * 5 + 5 * 4) / (17 * 16)).pvalue > 0.001


@pytest.mark.parametrize("epoch", [0, 1])
def test_balanced_batches_of_imbalanced_data(epoch):
    """32 images of class 0, 7 of class 1, one of class 2: an epoch has as many steps and rows as ever."""
    rows = np.arange(200, dtype=np.float32)[:, None]
    labels_N, index_M = np.full(200, 9), np.arange(0, 200, 5)
    labels_N[index_M] = np.repeat([0, 1, 2], [32, 7, 1])
    plain = Batches(rows, labels_N, index_M, 16, CPU)
    balanced = replace(plain, balanced=True)
    steps = list(balanced.epoch(3, epoch))
    drawn, labels = (torch.cat(parts) for parts in zip(*steps, strict=True))
    drawn = drawn[:, 0].long()
    assert [len(labels_B) for _, labels_B in steps] == [14, 13, 13] and len(balanced) == len(plain) == 3
    assert labels.equal(torch.from_numpy(labels_N)[drawn]) and set(drawn.tolist()) <= set(index_M.tolist())
    assert sorted(torch.bincount(labels).tolist()) == [13, 13, 14]
    assert len(set(drawn.tolist())) >= 13 + 7 + 1
    again, other = (torch.cat([x for x, _ in balanced.epoch(*key)])[:, 0] for key in ((3, epoch), (4, epoch)))
    assert drawn.equal(again.long()) and not drawn.equal(other.long())
    tail = list(balanced.epoch(3, epoch, 1))
    assert all(
        a.equal(b)
        for ours, theirs in zip(steps[1:], tail, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    # `in_order` scores a split: each of its rows once.
    assert torch.cat([x for x, _ in balanced.in_order()])[:, 0].tolist() == index_M.tolist()


@pytest.mark.parametrize("epoch", [0, 1])
def test_so_many_draws_of_every_class_each_augmented_anew(epoch):
    """Classes of 6, 3 and 1 images, 6 draws each: exactly 6, 12 and 6 times 1, 2 and 6; no two alike."""
    rows, _ = tiny.images(11)
    labels_N = np.repeat([4, 7, 8, 9], [6, 3, 1, 1])  # the last is of another split
    plain = Batches(rows, labels_N, np.arange(10), 5, CPU, PREPROCESS, RECIPE, True)
    batches = replace(plain, draws_per_class=6)
    assert (plain.n_examples, len(plain)) == (10, 2) and (batches.n_examples, len(batches)) == (18, 4)
    steps = list(batches.epoch(0, epoch))
    assert [len(labels_B) for _, labels_B in steps] == [5, 5, 4, 4]
    inputs, labels = (torch.cat(parts) for parts in zip(*steps, strict=True))
    assert [(labels == label).sum().item() for label in (4, 7, 8)] == [6, 6, 6]
    only = inputs[labels == 8].flatten(1)
    assert len(torch.unique(only, dim=0)) == 6  # of one image
    drawn = torch.cat([i for i, _ in replace(batches, rows=np.arange(11.0)[:, None], preprocess=None,
                                             augmentation=AugmentConfig()).epoch(0, epoch)])  # fmt: skip
    assert torch.bincount(drawn[:, 0].long()).tolist() == [1] * 6 + [2] * 3 + [6]
    assert torch.cat([y for _, y in batches.in_order()]).tolist() == labels_N[:10].tolist()
    tail = list(batches.epoch(0, epoch, 3))
    assert len(tail) == 1 and tail[0][0].equal(steps[3][0])


def test_draws_are_counted_where_sampling_is_balanced_alone():
    batches = replace(numbered(10, 4), draws_per_class=3)
    assert (batches.n_examples, len(batches)) == (10, 3)


def test_balanced_epochs_differ():
    batches = replace(numbered(40, 8), balanced=True)
    orders = [torch.cat([x for x, _ in batches.epoch(0, epoch)])[:, 0] for epoch in (0, 1)]
    assert not orders[0].equal(orders[1])


# --------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("size", [16, 24, 40])
def test_an_epoch_at_any_size_augments_the_stored_images_and_then_resizes(size):
    """Each step with draws of its own; the colour of erased rectangles is what normalises to zero."""
    batches = augmented()
    at_size = batches.at_size(size)
    preprocess = Preprocess(size, PREPROCESS.mean, PREPROCESS.std, PREPROCESS.interpolation)
    parts = np.array_split(np.random.default_rng([3, 2]).permutation(batches.index_M), len(batches))
    for step, ((inputs, labels_B), part) in enumerate(zip(at_size.epoch(3, 2), parts, strict=True)):
        generator = torch.Generator().manual_seed(derived_seed(3, 2, step))
        images = augment(torch.from_numpy(batches.rows[part]), RECIPE, generator, PREPROCESS.fill)
        assert inputs.shape[2:] == (size, size) and inputs.equal(preprocess(images))
        assert labels_B.tolist() == batches.labels_N[part].tolist()
    stored = torch.cat([inputs for inputs, _ in at_size.in_order()])
    assert stored.equal(preprocess(torch.from_numpy(batches.rows)))
    assert batches.preprocess == PREPROCESS  # these stay as they were


def test_without_augmentation_an_epoch_gives_the_images_as_they_are():
    batches = replace(augmented(), augmentation=AugmentConfig())
    seen, stored = (torch.cat([x for x, _ in steps]) for steps in (batches.epoch(0, 0), batches.in_order()))
    order_M = np.random.default_rng([0, 0]).permutation(batches.index_M)
    assert seen.equal(stored[torch.from_numpy(order_M)])


def test_features_have_no_size():
    batches = numbered(10, 5)
    features = torch.cat([x for x, _ in batches.at_size(48).in_order()])
    assert features.equal(torch.cat([x for x, _ in batches.in_order()]))


# -------------------------------------------------------------------------------------- reading ahead


def mapped(tmp_path, rows: np.ndarray, mode: str = "r") -> np.memmap:
    np.save(tmp_path / "rows.npy", rows)
    return np.load(tmp_path / "rows.npy", mmap_mode=mode)


@pytest.mark.parametrize("mode", ["r", "c"])  # as the store and the features are opened
def test_rows_of_a_memory_map_give_the_same_batches(tmp_path, mode):
    plain = augmented(23)
    ahead = replace(plain, rows=mapped(tmp_path, plain.rows, mode))
    assert isinstance(ahead.rows, np.memmap)
    for start in (0, 2, 5):
        passes = list(zip(plain.epoch(1, 2, start), ahead.epoch(1, 2, start), strict=True))
        assert len(passes) == 5 - start
        assert all(torch.equal(a, b) for ours, theirs in passes for a, b in zip(ours, theirs, strict=True))
    passes = list(zip(plain.in_order(), ahead.in_order(), strict=True))
    assert len(passes) == 5
    assert all(torch.equal(a, b) for ours, theirs in passes for a, b in zip(ours, theirs, strict=True))
    expected = PREPROCESS(torch.from_numpy(plain.rows))
    assert torch.equal(torch.cat([x for (x, _), _ in passes]), expected)


class Recorded(np.ndarray):
    """An array that notes in which thread rows were taken from it, and which."""

    log: list[tuple[int, list]]

    def __array_finalize__(self, source):
        self.log = getattr(source, "log", [])

    def __getitem__(self, index):
        self.log.append((threading.get_ident(), index.tolist()))
        return super().__getitem__(index).view(np.ndarray)


def test_one_batch_is_read_ahead_by_another_thread():
    batches = numbered(20, 5)
    rows = batches.rows.view(Recorded)
    steps = replace(batches, rows=rows).in_order()
    parts = [part.tolist() for part in np.array_split(batches.index_M, 4)]
    for step, (inputs, _) in enumerate(steps):
        assert inputs[:, 0].tolist() == parts[step]
        ahead, deadline = min(step + 2, 4), time.monotonic() + 20
        while len(rows.log) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(rows.log) == ahead
    assert [part for _, part in rows.log] == parts
    assert len({thread for thread, _ in rows.log} - {threading.get_ident()}) == 1


@pytest.mark.parametrize("order", ["epoch", "in_order"])
@pytest.mark.parametrize("taken", [1, 3, 4])
def test_no_reader_is_left_behind(tmp_path, order, taken):
    batches = numbered(20, 5)
    batches = replace(batches, rows=mapped(tmp_path, batches.rows))
    before = set(threading.enumerate())
    steps = batches.epoch(0, 0) if order == "epoch" else batches.in_order()
    for number, _ in enumerate(steps, start=1):
        assert len(set(threading.enumerate()) - before) == 1
        if number == taken:
            break
    steps.close()
    assert set(threading.enumerate()) == before


class Spy:
    """A memory map that counts what it is advised of."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping, self.advice = mapping, []

    def madvise(self, option: int) -> None:
        self.advice.append(option)
        self.mapping.madvise(option)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system has no such advice")
@pytest.mark.parametrize(("batches_between", "times"), [(0, 8), (2.5, 2), (100, 0)])
@pytest.mark.parametrize("mode", ["r", "c"])
def test_pages_are_given_back_and_rows_stay_right(tmp_path, monkeypatch, mode, batches_between, times):
    """Eight batches of 4 images; pages go after the first one with which more than so many were read."""
    plain = augmented(32, 4)
    rows = mapped(tmp_path, plain.rows, mode)
    rows._mmap = spy = Spy(rows._mmap)
    monkeypatch.setattr(batches_module, "MAPPED_BYTES", batches_between * plain.rows[:4].nbytes)
    ahead = replace(plain, rows=rows)
    for ours, theirs in zip(ahead.epoch(0, 1), plain.epoch(0, 1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert spy.advice == [mmap.MADV_DONTNEED] * times
    assert np.array_equal(rows, plain.rows)


def test_an_exception_in_reading_reaches_the_caller(tmp_path):
    batches = numbered(20, 5)
    index_M = np.append(batches.index_M[:9], 60)  # two batches of 5; there are 60 rows
    batches = replace(batches, rows=mapped(tmp_path, batches.rows), index_M=index_M, labels_N=np.arange(61))
    before = set(threading.enumerate())
    steps = batches.in_order()
    assert next(steps)[0][:, 0].tolist() == index_M[:5].tolist()
    with pytest.raises(IndexError, match="60 is out of bounds"):
        next(steps)
    assert list(steps) == [] and set(threading.enumerate()) == before


# -------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("size", [96, 48, 64])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_is_pillow_s(size, interpolation):
    coarse = np.random.default_rng(5).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(image.resize((size, size), Image.Resampling[interpolation.upper()])).astype(int)
    preprocess = Preprocess(size, PREPROCESS.mean, PREPROCESS.std, interpolation)
    out = preprocess(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0]
    restored = (out.permute(1, 2, 0) * torch.tensor(preprocess.std) + torch.tensor(preprocess.mean)) * 255
    difference = np.abs(restored.numpy() - expected)
    assert difference.max() <= 2.01 and difference.mean() < 0.3


def test_interpolations_are_told_apart():
    rows = torch.from_numpy(tiny.images(1)[0])
    a, b = (Preprocess(24, (0.5,) * 3, (0.5,) * 3, mode)(rows) for mode in ("bicubic", "bilinear"))
    assert (a - b).abs().max() > 0.05


def test_normalisation_is_torchvision_s():
    rows = torch.from_numpy(tiny.images(4, size=24)[0])
    expected = F.normalize(F.to_dtype(rows, torch.float32, scale=True), PREPROCESS.mean, PREPROCESS.std)
    out = PREPROCESS(rows)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)


def test_fill_normalises_to_nothing():
    patch = torch.tensor(PREPROCESS.fill, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 24, 24)
    assert PREPROCESS(patch).abs().max() <= 0.5 / 255 / min(PREPROCESS.std) + 1e-6
