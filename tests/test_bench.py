"""Benchmarks: rounds alternate, the roofline counts what it should, both ways see the same images."""

from __future__ import annotations

import copy
import os
from itertools import chain

import numpy as np
import pytest
import tiny
import torch
from conftest import MINI_WNIDS, noise
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from bench import conventional, large_store, scaling, tables, workload
from bench import input as bench_input
from bench.pair import Case, spread, take_turns
from bench.roofline import ADAMW_BYTES, Rates, Tally, count_step
from src import SetupError
from src.config import DataConfig
from src.data.batches import Batches, Preprocess
from src.data.sources import open_source
from src.files import write_json
from src.model.build import gmacs

# ------------------------------------------------------------------------------------------ taking turns


WAYS = '''
import os
import sys

print("of the import")


def way(label, log, n_good=10):
    """Rounds that write their name down, tell stdout about it, and fail after `n_good` of them."""
    print("of the setting up")
    n_rounds = 0

    def one_round():
        nonlocal n_rounds
        n_rounds += 1
        if n_rounds > n_good:
            raise ValueError("enough")
        print("of the round")
        os.write(1, b"straight to the descriptor\\n")
        os.system("echo of a child")
        with open(log, "a") as file:
            file.write(f"{label}{n_rounds} ")
        return {"value": float(n_rounds), "process": os.getpid()}

    return one_round


def broken(**_):
    raise ValueError("nothing can be set up")


def gone():
    return lambda: sys.exit(3)
'''


@pytest.fixture
def ways(tmp_path, monkeypatch) -> str:
    """The name of a module that workers can import."""
    (tmp_path / "some_ways.py").write_text(WAYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "some_ways"


def test_rounds_alternate_after_the_warm_up(ways, tmp_path, capfd):
    log = tmp_path / "log"
    settings = {"log": str(log)}
    both = {label: (f"{ways}:way", {**settings, "label": label}) for label in ("a", "b")}
    case = take_turns(both, rounds=3, warmup=2)
    assert log.read_text().split() == [f"{label}{n}" for n in range(1, 6) for label in "ab"]
    for label in both:
        assert case.measured[label]["value"] == [3.0, 4.0, 5.0]
        assert len(case.measured[label]["peak_memory_gb"]) == 3
        assert min(case.measured[label]["peak_memory_gb"]) > 0.01
    processes = [set(case.measured[label]["process"]) for label in both]
    assert all(len(one) == 1 for one in processes) and processes[0] != processes[1]
    printed = capfd.readouterr()  # what ways print is told to people, not to the harness
    told = printed.err.splitlines()
    assert (told.count("of the import"), told.count("of the setting up")) == (2, 2)
    for line in ("of the round", "straight to the descriptor", "of a child"):
        assert told.count(line) == 2 * 5 and line not in printed.out


@pytest.mark.parametrize(
    ("function", "settings", "said"),
    [
        ("broken", {}, "nothing can be set up"),
        ("way", {"label": "a", "n_good": 1}, "enough"),
        ("gone", {}, ""),
        ("missing", {}, "missing"),
    ],
)
def test_a_way_that_fails_is_named(ways, tmp_path, capfd, function, settings, said):
    if function == "way":
        settings = {**settings, "log": str(tmp_path / "log")}
    status = 3 if function == "gone" else 1
    with pytest.raises(SetupError, match=f"{ways}:{function} ended with exit status {status}"):
        take_turns({"only": (f"{ways}:{function}", settings)}, rounds=3)
    assert said in capfd.readouterr().err


def test_row_is_round_by_round(capsys):
    """The median of ratios is not the ratio of medians."""
    case = Case(
        {
            "conventional": {"seconds": [6.0, 2.0, 30.0], "rate": [10.0, 40.0, 20.0]},
            "ours": {"seconds": [1.0, 4.0, 6.0], "rate": [30.0, 20.0, 20.0]},
        }
    )
    row = case.row("seconds", "a thing", "s")
    assert (row["what"], row["unit"], row["rounds"]) == ("a thing", "s", 3)
    assert row["conventional"] == {"median": 6.0, "low": 2.0, "high": 30.0}
    assert row["ours"] == {"median": 4.0, "low": 1.0, "high": 6.0} == case.summary("ours", "seconds")
    assert row["ratio"] == {"median": 5.0, "low": 0.5, "high": 6.0}
    assert case.row("rate", "", "images/s")["ratio"] == {"median": 1.0, "low": 0.5, "high": 3.0}
    turned = case.row("rate", "", "images/s", ("ours", "conventional"))
    assert turned["ratio"] == {"median": 1.0, "low": 1 / 3, "high": 2.0}
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "a thing: conventional 6 [2, 30], ours 4 [1, 6] s: 5 [0.5, 6] times"


def test_ways_of_unequal_length_are_no_pair():
    with pytest.raises(ValueError, match="argument 2"):
        Case({"conventional": {"x": [1.0, 2.0]}, "ours": {"x": [1.0]}}).row("x", "", "s")


def test_spread_has_three_digits():
    assert spread({"median": 1234.5, "low": 0.012345, "high": 99.95}) == "1,234 [0.0123, 100]"


# ---------------------------------------------------------------------------------------------- roofline


def test_tally_of_a_linear_layer():
    B, D, K = 7, 5, 3
    x_BD, weight_KD, bias_K = torch.empty(B, D), torch.empty(K, D), torch.empty(K)
    with Tally() as tally:
        F.linear(x_BD, weight_KD, bias_K)
    assert tally.operations == [(2 * B * D * K, 4 * (B * D + K * D + K + B * K), False)]
    with Tally() as tally:
        F.linear(x_BD.bfloat16(), weight_KD.bfloat16(), bias_K.bfloat16())
    assert tally.operations[-1] == (2 * B * D * K, 2 * (B * D + K * D + K + B * K), False)


@pytest.mark.parametrize(
    ("C", "D", "groups", "kernel", "stride"),
    [(4, 6, 1, 3, 1), (6, 4, 2, 3, 2), (8, 8, 8, 7, 1), (4, 8, 4, 1, 1)],
)
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_tally_of_a_convolution(C, D, groups, kernel, stride, needs):
    """2 B D H' W' (C / groups) k k forward, and as much again for each gradient that is asked for."""
    x_BCHW = torch.empty(2, C, 12, 10, requires_grad=needs[0])
    weight = torch.empty(D, C // groups, kernel, kernel, requires_grad=needs[1])
    with Tally() as tally:
        out = F.conv2d(x_BCHW, weight, stride=stride, padding=kernel // 2, groups=groups)
    height, width = out.shape[2:]
    assert (height, width) == (12 // stride, 10 // stride)
    forward = 2 * 2 * D * height * width * (C // groups) * kernel**2
    n_values = x_BCHW.numel() + weight.numel() + out.numel()
    assert tally.operations == [(forward, 4 * n_values, False)]
    with Tally() as tally:
        out.backward(torch.empty_like(out))
    (flops, n_bytes, pointwise), *rest = tally.operations
    gradients = [tensor.numel() for tensor, needed in zip((x_BCHW, weight), needs, strict=True) if needed]
    assert (flops, n_bytes, pointwise) == (forward * sum(needs), 4 * (n_values + sum(gradients)), False)
    assert not any(flops for flops, _, _ in rest)


def test_views_and_allocations_cost_nothing():
    x = torch.empty(2, 6, 4, 4)
    with Tally() as tally:
        x.view(2, -1), x.flatten(1), x.reshape(12, 16), x.permute(0, 2, 3, 1), x.transpose(1, 2), x[0].mT
        x[:1].expand(3, -1, -1, -1), x.split(2, 1), x.chunk(2, 1), x.unbind(0), x[:, 1:3], x.detach()
        torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((2, 3), (3, 1))
    assert tally.operations == []
    with Tally() as tally:
        x.permute(0, 2, 3, 1).contiguous()
    assert [n_bytes for _, n_bytes, _ in tally.operations] == [2 * x.nbytes]  # it has to copy


def test_a_tensor_used_twice_is_moved_once():
    x = torch.empty(10, 10)
    with Tally() as tally:
        x @ x
        x.mul_(x)
    assert [n_bytes for _, n_bytes, _ in tally.operations] == [2 * 400, 400]


def test_pointwise_operations_are_free_when_fused():
    x = torch.empty(8, 8)
    with Tally() as tally:
        F.gelu(x) * 2 + x
        x.add_(1)
    assert len(tally.operations) == 4 and all(pointwise for _, _, pointwise in tally.operations)
    rates = Rates(flops=1e9, bytes=1e9)
    assert tally.seconds(rates, fused=True) == 0
    assert tally.seconds(rates) == pytest.approx(4 * (2 * 64 + 2 * 64 + 3 * 64 + 64) / 1e9)
    with Tally() as tally:
        x.sum(), x @ x
    assert tally.seconds(rates, fused=True) == tally.seconds(rates) > 0


def test_seconds_takes_the_slower_of_each_operation():
    tally = Tally()
    tally.operations = [(100.0, 10.0, False), (10.0, 100.0, False), (0.0, 30.0, True)]
    assert tally.seconds(Rates(flops=10.0, bytes=5.0)) == 10 + 20 + 6
    assert tally.seconds(Rates(flops=10.0, bytes=5.0), fused=True) == 10 + 20
    assert tally.seconds(Rates(flops=100.0, bytes=1.0)) == 10 + 100 + 30


def flops(tally: Tally) -> float:
    return sum(flops for flops, _, _ in tally.operations)


def plain_net() -> nn.Sequential:
    """Convolutions without groups, and a linear layer."""
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def test_forward_flops_are_torch_s():
    model, images = plain_net(), torch.zeros(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(images)
    with Tally() as tally:
        model(images)
    by_hand = 2 * 2 * (8 * 8 * 8 * 3 * 9 + 16 * 8 * 8 * 8 + 16 * 10)
    assert flops(tally) == counter.get_total_flops() == by_hand


def test_step_of_a_linear_model():
    """Forward and the weight's gradient; images need none."""
    B, size, K = 4, 6, 5
    D = 3 * size * size
    model = nn.Sequential(nn.Flatten(), nn.Linear(D, K))
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        tally = count_step(model, B, size, dtype)
        products = [operation for operation in tally.operations if operation[0]]
        forward = (2 * B * D * K, width * (B * D + D * K + K + B * K), False)
        backward = (2 * B * D * K, width * (B * D + D * K + B * K), False)
        assert products == [forward, backward]
        assert tally.operations[-1] == (0, ADAMW_BYTES * (D * K + K), False)
        others = sum(n_bytes for _, n_bytes, _ in tally.operations[:-1]) - forward[1] - backward[1]
        assert width * 4 * B * K <= others <= width * 16 * B * K + 400  # softmax and loss, there and back


def test_step_of_a_convolutional_net():
    """Each layer three times, but for the first one, which has no gradient of its input."""
    tally = count_step(plain_net(), 2, 16, torch.float32)
    first, rest = 8 * 8 * 8 * 3 * 9, 16 * 8 * 8 * 8 + 16 * 10
    assert flops(tally) == 2 * 2 * (2 * first + 3 * rest)


def test_a_frozen_part_has_no_gradients():
    model = plain_net()
    model[:-1].requires_grad_(False)
    tally = count_step(model, 2, 16, torch.float32)
    forward = 8 * 8 * 8 * 3 * 9 + 16 * 8 * 8 * 8 + 16 * 10
    assert flops(tally) == 2 * 2 * (forward + 16 * 10)
    assert tally.operations[-1][1] == ADAMW_BYTES * (16 * 10 + 10)


@pytest.mark.parametrize("backbone", [tiny.CONVNEXT, tiny.EFFICIENTNET])
def test_step_of_a_whole_model_is_three_forward_passes(tmp_path, backbone):
    """Depthwise layers included: counted as if they had no groups, they would be several times as much."""
    batch, model = 6, tiny.build(tmp_path, backbone=backbone, head="attention").model
    forward = 2e9 * batch * gmacs(model, tiny.SIZE)
    with sdpa_kernel(SDPBackend.MATH):
        assert 2.75 * forward < flops(count_step(model, batch, tiny.SIZE, torch.float32)) < 3.001 * forward


# -------------------------------------------------------------------------------------- the two ways agree


def test_conventional_transforms():
    image = noise(3, (40, 30))
    torch.manual_seed(0)
    training = conventional.training_transform(24)
    plain = conventional.plain_transform(24)(image)
    outs = [plain, *(training(image) for _ in range(20))]
    assert all((out.dtype, out.shape) == (torch.float32, (3, 24, 24)) for out in outs)
    assert plain.equal(conventional.plain_transform(24)(image))
    assert sum(not out.equal(plain) for out in outs[1:]) > 10  # RandAugment's identity is rare
    stored = conventional.stored_size_transform()
    outs = [stored(image) for _ in range(20)]
    assert all((out.dtype, out.shape) == (torch.uint8, (3, 30, 40)) for out in outs)
    assert any(not out.equal(outs[0]) for out in outs[1:])


@pytest.mark.parametrize("size", [96, 48, 64])
def test_both_ways_feed_the_same_input(size):
    """The conventional transform and ours, both bilinear: equal but for the rounding of a level."""
    image = noise(4)
    preprocess = Preprocess(size, conventional.MEAN, conventional.STD, "bilinear")
    ours = preprocess(transforms.PILToTensor()(image)[None])[0]
    levels = (ours - conventional.plain_transform(size)(image)).abs() * 255
    levels *= torch.tensor(conventional.STD)[:, None, None]
    assert levels.max() < 1.01 and levels.mean() < 0.1
    other = Preprocess(size, conventional.MEAN, conventional.STD, "bicubic")
    assert size == 64 or (other(transforms.PILToTensor()(image)[None])[0] - ours).abs().max() > 0.05


def test_a_conventional_step():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    nn.init.normal_(model[5].weight)
    before = copy.deepcopy(model)
    trained = list(chain(model[3].parameters(), model[5].parameters()))
    loop = conventional.Loop(model, [{"params": trained, "lr": 0.01}], amp=False, label_smoothing=0.5)
    images, labels = torch.randn(10, 3, 2, 2), torch.arange(10) % 3
    loss, n_correct = loop.step(images, labels)

    logits = before(images)
    assert loss == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.5).item(), rel=1e-5)
    assert isinstance(n_correct, int) and n_correct == (logits.argmax(1) == labels).sum().item()
    after, expected = model.cpu().state_dict(), before.state_dict()
    changed = {name for name in expected if not torch.equal(after[name], expected[name])}
    assert changed == {"3.weight", "3.bias", "5.weight", "5.bias"}


def test_a_conventional_epoch(image_folder):
    """Every image once in batches of 32; scoring trains nothing."""
    train = conventional.loader(image_folder / "train", conventional.plain_transform(16), shuffle=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    loop = conventional.Loop(model, [{"params": list(model.parameters()), "lr": 1e-3}], amp=False)
    seen, step = [], loop.step
    loop.step = lambda images, labels: seen.extend(labels.tolist()) or step(images, labels)
    accuracies = list(loop.accuracies(3, train, train))
    assert len(seen) == 3 * 20 and all(sum(seen[i : i + 20]) == 10 for i in (0, 20, 40))
    state = copy.deepcopy(model.state_dict())
    assert loop.evaluate(train) == accuracies[-1] and len(seen) == 3 * 20
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    logits, labels = model.cpu()(torch.stack([image for image, _ in train.dataset])), train.dataset.targets
    assert accuracies[-1] == (logits.argmax(1) == torch.tensor(labels)).double().mean().item()
    assert len(accuracies) == 3 and accuracies[-1] > 0.5


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_image_folder_holds_the_source_s_files(miniature, mini_counts, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(workload, "CACHE", tmp_path / "cache" / "bench")
    data = str(getattr(miniature, layout)(tmp_path / "tiny"))
    folder = workload.image_folder(data, 4, 5, 2)
    assert folder.parent.parent == tmp_path / "cache" / "bench"
    for split, n in (("train", 5), ("valid", 2)):
        wnids = sorted(path.name for path in (folder / split).iterdir())
        assert wnids == sorted(MINI_WNIDS)[:4]
        for wnid in wnids:
            files = [path.read_bytes() for path in sorted((folder / split / wnid).iterdir())]
            source = miniature.images[split, wnid]
            assert len(files) == len(set(files)) == n and set(files) <= set(source)
            if layout == "parquet":
                assert files == source[:n]  # the first ones
    assert sorted(path.name for path in folder.iterdir()) == ["train", "valid"]
    assert workload.described(folder) == "tiny-imagenet, 4 classes x 5 train + 2 valid images"


def test_image_folder_is_written_once(miniature, mini_counts, tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "CACHE", tmp_path / "cache" / "bench")
    data = str(miniature.parquet(tmp_path / "tiny"))
    fingerprint = open_source(DataConfig(source="local", path=data), tmp_path).fingerprint[:12]
    partial = tmp_path / "cache" / "bench" / fingerprint / "tiny-imagenet-2x3+1.partial" / "train" / "n0"
    partial.mkdir(parents=True)  # what a call that was cut off left
    folder = workload.image_folder(data, 2, 3, 1)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert len([path for path in written if path.is_file()]) == 2 * (3 + 1)
    assert not (folder / "train" / "n0").exists()
    assert workload.image_folder(data, 2, 3, 1) == folder
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = workload.image_folder(data, 2, 2, 1)
    assert other != folder and len([path for path in other.rglob("*") if path.is_file()]) == 2 * (2 + 1)


def test_image_folder_refuses_data_that_hold_fewer_images(miniature, mini_counts, tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "CACHE", tmp_path / "cache" / "bench")
    with pytest.raises(SetupError, match="has only 12 of the 1x1000"):
        workload.image_folder(str(miniature.parquet(tmp_path / "data")), 1, 1000, 0)
    assert not list((tmp_path / "cache").rglob("train/*/1.jpeg"))


def test_a_view_of_a_fresh_product_moves_nothing():
    with Tally() as tally:
        nn.functional.linear(torch.empty(2, 3, 4), torch.empty(5, 4))
    assert len(tally.operations) == 1


# ------------------------------------------------------------------------------------------- our input


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The inputs of every epoch of `Batches` that a round goes through."""
    inputs, epoch = [], Batches.epoch

    def watched(self, *args):
        for x, labels_B in epoch(self, *args):
            inputs.append(x)
            yield x, labels_B

    monkeypatch.setattr(Batches, "epoch", watched)
    return inputs


@pytest.mark.parametrize("what", bench_input.LABELS)
def test_our_input_is_what_its_label_says(miniature, mini_counts, tmp_path, monkeypatch, seen, what):
    for module in (workload, bench_input):
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache" / "bench")
    folder = str(workload.image_folder(str(miniature.folder(tmp_path / "tiny")), 4, 5, 2))
    one_round = bench_input.our_input(folder, what)
    assert all(one_round()["images_per_s"] > 0 for _ in range(2))
    if what == "decode":
        assert seen == []
        return
    first, second = (sorted(x.double().mean((1, 2, 3)).tolist()) for x in seen)
    shape, dtype = (
        ((20, 3, 64, 64), torch.uint8) if what == "train_stored" else ((20, 3, 224, 224), torch.float32)
    )
    assert all((x.shape, x.dtype) == (shape, dtype) for x in seen)
    assert (first == pytest.approx(second, abs=1e-5)) == (what == "plain_224")  # the rest is augmented


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux only")
@pytest.mark.parametrize(
    "settings", [{"share": 1.0, "cold": True}, {"share": 1.0}, {"share": 0.5, "augmented": True}]
)
def test_a_large_store_is_read_as_asked_for(tmp_path, seen, settings):
    rows = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 288, 288)
    np.save(tmp_path / "rows.npy", rows.numpy())
    result = large_store.read(str(tmp_path / "rows.npy"), **settings)()
    assert all(result[key] > 0 for key in ("images_per_s", "own_gb", "mapped_gb"))
    [inputs] = seen
    if "augmented" in settings:
        assert (inputs.shape, inputs.dtype) == ((3, 3, 288, 288), torch.float32)
    else:
        assert sorted(inputs[:, 0, 0, 0].tolist()) == list(range(6)) and inputs.dtype == torch.uint8


def test_input_grows_with_the_resolution(seen):
    assert scaling.resolution(16, "anywhere")()["seconds"] > 0
    assert sum(map(len, seen)) == 512
    assert all((x.shape[1:], x.dtype) == ((3, 16, 16), torch.float32) for x in seen)


# ------------------------------------------------------------------------------------------------ tables


def measured(root, hardware: str, benchmark: str, rows: dict) -> None:
    folder = root / "bench" / "results" / hardware.lower().replace(" ", "-")
    data = {"data": f"photos, {len(hardware)} classes x 4 train + 2 valid images"}
    write_json(folder / f"{benchmark}.json", {"hardware": hardware, **data, "rows": rows})


def compared(conventional: float, ours: float, unit: str = "images/s") -> dict:
    case = Case({"conventional": {"x": [conventional]}, "ours": {"x": [ours]}})
    return case.row("x", "training batches", unit)


def test_the_speed_table_says_what_was_measured_and_what_was_not(tmp_path):
    measured(tmp_path, "AMD 2 CPU cores", "input", {"train_224": compared(500, 2500)})
    images, cpu, gpu = tables.speed(tmp_path).split("\n\n")
    assert images.endswith(" batches and decoding (photos, 15 classes x 4 train + 2 valid images).")
    assert "| training batches | 500 images/s | 2,500 images/s | **5.0** [5.0, 5.0] |" in cpu
    assert "AMD 2 CPU cores" in cpu and "not measured yet" in gpu and "make bench" in gpu and "\n" not in gpu
    measured(tmp_path, "Tesla T4", "input", {"train_224": compared(1000, 4000)})
    both = tables.speed(tmp_path)
    assert "not measured yet" not in both and "Tesla T4" in both and "**4.0**" in both


def test_tables_of_nothing_are_empty(tmp_path):
    assert tables.steps(tmp_path) == tables.growth(tmp_path) == tables.hotspots(tmp_path) == ""
