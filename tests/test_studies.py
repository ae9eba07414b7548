"""The other studies of the family: their parts of a data set, presets, rows, costs and reported numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import torchvision
from torch import nn

from src import SetupError
from src.commands import main
from src.config import CHOICES, PRESETS, ModelConfig, preset
from src.data import subsets
from src.data.store import Store
from src.data.subsets import PARTS, part_of
from src.experiment import Paths
from src.model import build as building
from src.model.build import build_model, cost
from src.optim import build_optimizer, lr_at
from src.studies import STUDIES, animals, fine_grained, reported
from src.studies import run as study_run
from src.studies.run import Plan

FAMILY = ("animals40", "dogs20", "fine_grained")
OTHERS = ("n02666196", "n03042490", "n09428293")  # no animals


def made_store(wnids: tuple[str, ...], train: int, valid: int) -> Store:
    """A store of so many images a class, without pixels, in a mixed order."""
    rows = [
        (k, split)
        for k in range(len(wnids))
        for split, n in (("train", train), ("valid", valid))
        for _ in range(n)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    labels_N = np.array([rows[i][0] for i in order])
    split_N = np.array([rows[i][1] for i in order])
    ids_N = np.array([f"image {i}" for i in order])
    classes = [{"index": k, "wnid": wnid, "name": f"name of {wnid}"} for k, wnid in enumerate(wnids)]
    manifest = {"source": "tiny-imagenet", "classes": classes, "sha256": "0" * 64, "size": 8}
    images = np.zeros((len(rows), 3, 8, 8), np.uint8)
    return Store(Path("store"), images, labels_N, split_N, ids_N, order.astype(np.uint64), manifest)


@pytest.fixture(scope="module")
def zoo() -> Store:
    """59 animals, the breeds and look-alikes among them, and three other classes."""
    some = sorted(set(subsets.LOOK_ALIKES))
    more = [f"n01{i:06d}" for i in range(59 - len(some))]
    return made_store(tuple(sorted([*some, *more, *OTHERS])), train=300, valid=50)


# ------------------------------------------------------------------------------------------------- parts


def test_every_part_is_a_choice():
    assert set(PARTS) == set(CHOICES["data.classes"])


@pytest.mark.parametrize("name", ["source", "target", "dogs6", "look_alikes", "largest20"])
def test_a_part_keeps_every_row_of_its_classes_and_no_other(zoo, name):
    part = part_of(zoo, name)
    kept_N = part.labels_N >= 0
    assert (np.isin(np.array(zoo.wnids)[zoo.labels_N], part.wnids) == kept_N).all()
    assert (np.array(part.wnids)[part.labels_N[kept_N]] == np.array(zoo.wnids)[zoo.labels_N[kept_N]]).all()
    assert (part.official_split_N[kept_N] == zoo.official_split_N[kept_N]).all()
    assert (part.official_split_N[~kept_N] == "").all()
    assert part.class_names == tuple(f"name of {wnid}" for wnid in part.wnids)


def test_stand_ins_say_so(zoo):
    for name in ("dogs6", "look_alikes", "animals40"):
        assert part_of(zoo, name).manifest["source"].startswith("tiny-imagenet, a stand-in of ")
    assert part_of(zoo, "all") is zoo


def test_look_alikes_are_what_the_profile_says():
    assert len(set(subsets.LOOK_ALIKES)) == len(subsets.LOOK_ALIKES) == 33
    assert set(subsets.DOGS) < set(subsets.LOOK_ALIKES)
    assert all(wnid < subsets.ANIMALS_END for wnid in subsets.LOOK_ALIKES)


def test_animals_are_dealt_out_as_the_study_has_them(zoo):
    part = part_of(zoo, "animals40")
    animal_N = np.array([wnid < subsets.ANIMALS_END for wnid in zoo.wnids])[zoo.labels_N]
    split_N, labels_N = part.official_split_N, part.labels_N
    assert len(part.wnids) == 40 and not set(OTHERS) & set(part.wnids)
    test_N = split_N == "test"
    assert (test_N == (animal_N & (zoo.official_split_N == "valid"))).all() and test_N.sum() == 59 * 50
    assert (labels_N[test_N] >= 0).sum() == 40 * 50 and (labels_N[test_N] == -1).sum() == 19 * 50
    known_N = labels_N >= 0
    assert (np.array(part.wnids)[labels_N[known_N]] == np.array(zoo.wnids)[zoo.labels_N[known_N]]).all()
    for k in range(40):
        train, valid = ((split_N[labels_N == k] == name).sum() for name in ("train", "valid"))
        assert 150 <= train + valid <= 250 and valid == round(0.15 * (train + valid))
    sizes = [(np.isin(split_N, ("train", "valid")) & (labels_N == k)).sum() for k in range(40)]
    assert len(set(sizes)) > 20  # drawn, not all alike
    assert (zoo.official_split_N[np.isin(split_N, ("train", "valid"))] == "train").all()


def test_the_key_of_the_test_images_has_every_animal(zoo):
    part = part_of(zoo, "animals40")
    names = np.array([*part.class_names, *part.unknown_names])
    assert len(names) == len(set(names)) == 59 and len(part.unknown_names) == 19
    test_N, known_N = part.official_split_N == "test", part.labels_N >= 0
    truth_N = np.array(zoo.class_names)[zoo.labels_N[test_N]]
    assert (names[part.true_labels_N[test_N]] == truth_N).all()
    assert (part.true_labels_N[test_N & known_N] == part.labels_N[test_N & known_N]).all()
    assert (part.true_labels_N[test_N & ~known_N] >= 40).all()
    assert zoo.true_labels_N is None and zoo.unknown_names == ()


def test_animals_are_the_same_whatever_the_order_of_rows(zoo):
    order = np.random.default_rng(1).permutation(len(zoo))
    arrays = ("images", "labels_N", "official_split_N", "image_ids_N", "digests_N")
    shuffled = replace(zoo, **{name: getattr(zoo, name)[order] for name in arrays})
    a, b = part_of(zoo, "animals40"), part_of(shuffled, "animals40")
    assert dict(zip(a.image_ids_N, a.official_split_N, strict=True)) == dict(
        zip(b.image_ids_N, b.official_split_N, strict=True)
    )


def test_the_challenge_is_taken_whole_or_not_at_all():
    """40 classes and 3,000 images without a label; those that are skipped as unreadable count."""
    wnids = tuple(f"animal {k:02d}" for k in range(40))
    store = made_store(wnids, train=100, valid=2)
    test_N = np.zeros(len(store), bool)
    test_N[np.flatnonzero(store.official_split_N == "train")[:3000]] = True
    split_N = np.where(test_N, "test", store.official_split_N)
    whole = replace(store, labels_N=np.where(test_N, -1, store.labels_N), official_split_N=split_N)
    assert part_of(whole, "challenge40") is whole
    split_N = split_N.copy()
    split_N[np.flatnonzero(test_N)[0]] = ""
    half = replace(whole, official_split_N=split_N)
    with pytest.raises(SetupError, match=r"40 classes and 2,999 images right below test/.*40 and 3,000"):
        part_of(half, "challenge40")
    bad = half.manifest | {"bad_files": [{"image_id": "test/1.jpg"}]}
    assert part_of(replace(half, manifest=bad), "challenge40").labels_N is half.labels_N
    with pytest.raises(SetupError, match="3 classes .* preset `improvement`"):
        part_of(made_store(OTHERS, 3, 1), "challenge40")
    assert PRESETS["animals40"].data.classes == "challenge40"


def test_rows_without_a_class_stay_without_one(zoo):
    labels_N = np.where(np.arange(len(zoo)) % 7 == 0, -1, zoo.labels_N)
    part = part_of(replace(zoo, labels_N=labels_N), "dogs6")
    assert (part.labels_N[labels_N == -1] == -1).all()


def test_the_largest_are_those_with_most_images():
    store = made_store(tuple(f"n{i:08d}" for i in range(25)), train=3, valid=1)
    dropped = np.isin(store.labels_N, (0, 7, 11, 12, 24)) & (store.official_split_N == "train")
    fewer = replace(store, labels_N=np.where(dropped, -1, store.labels_N))
    assert part_of(fewer, "largest20").wnids == tuple(
        w for i, w in enumerate(store.wnids) if i not in (0, 7, 11, 12, 24)
    )


@pytest.mark.parametrize("name", ["dogs6", "look_alikes", "animals40"])
def test_parts_of_other_data_are_refused(name):
    with pytest.raises(SetupError, match=r"tiny-imagenet (lacks|has).*") as refused:
        part_of(made_store(OTHERS, 3, 1), name)
    assert "Tiny-ImageNet" in str(refused.value)


# ----------------------------------------------------------------------------------- presets, as documented


def trained(config: ModelConfig, k: int):
    """The preset's model on a tiny ConvNeXt."""
    tiny_config = replace(
        config, backbone=tiny.CONVNEXT.split(".")[0], weights="random", image_size=tiny.SIZE
    )
    return build_model(tiny_config, tuple(f"c{i}" for i in range(k)), 0).model


def learning_of(config: ModelConfig, k: int) -> set[str]:
    """What of the preset's own network learns: blocks of the backbone, layers of the head. No memory."""
    tag = config.backbone.partition("@")[0]
    with torch.device("meta"):
        backbone = building._created(tag, config.drop_path)
        backbone.reset_classifier(0)
        map_shape = building._map_shape(backbone, tag, config.image_size)
        model = building.Classifier(backbone, k, config, map_shape)
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    return {
        re.match(r"backbone\.stages\.\d\.(blocks\.\d+|\w+)|backbone\.\w+|neck\.\d|[^.]+", name)[0]
        for name in learns
    }


def test_animals_are_trained_as_the_report_says():
    config = PRESETS["animals40"]
    model = trained(config.model, 40)
    assert [type(layer) for layer in model.neck] == [nn.Dropout, nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert (model.neck[0].p, model.dropout.p, model.neck[1].out_features) == (0.6, 0.6, 512)
    assert model.classifier.out_features == 40
    blocks = list(model.backbone.stages[-1].blocks)[-2:]
    learns = {p for block in blocks for p in block.parameters()}
    frozen = [
        p
        for name, p in model.backbone.named_parameters()
        if name.startswith(("stem", "stages.0", "stages.1"))
    ]
    assert all(p.requires_grad for p in learns) and not any(p.requires_grad for p in frozen)
    assert learning_of(config.model, 40) == {
        *("backbone.stages.3.blocks.1", "backbone.stages.3.blocks.2"),
        *("backbone.head", "neck.1", "neck.2", "classifier"),  # of the backbone's head, the last norm
    }
    optimizer = build_optimizer(model, config.optim)
    assert type(optimizer) is torch.optim.AdamW
    assert {group["base_lr"] for group in optimizer.param_groups} == {1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 1e-3}
    assert config.optim.label_smoothing == 0.2 and config.optim.schedule == "cosine"
    train = config.train
    assert (train.epochs, train.batch_size, train.monitor, train.patience) == (20, 32, "loss", 3)
    assert (config.augment.flip, config.augment.rotation, config.model.image_size) == (0.5, 30.0, 224)
    assert config.augment.jitter == 0.2  # the report names no strength
    assert config.data.sampling == "balanced" and config.data.resize == "squash"
    # torchvision's ConvNeXt-Tiny with that head: 27.82 M of backbone, 0.41 M of head
    parameters, _ = cost(config.model, 40)
    assert parameters == 27_820_128 + 768 * 512 + 2 * 512 + 512 * 40 + 40


@pytest.mark.parametrize("profile", ["quick", "offline"])
@pytest.mark.parametrize(("arm", "rate"), [("animals40", 1e-3), ("fine_grained", 5e-4)])
def test_all_parameters_have_one_rate_in_small_profiles_too(arm, profile, rate):
    config = preset(arm, profile)
    optimizer = build_optimizer(trained(config.model, 5), config.optim)
    assert {group["base_lr"] for group in optimizer.param_groups} == {rate}


def test_dogs_are_trained_alike_and_without_augmentation():
    config = PRESETS["dogs20"]
    assert config.augment.is_identity and config.model.trainable == "none"
    model = trained(config.model, 20)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert cost(config.model, 20)[0] == 87_566_464 + 1024 * 20 + 20
    optimizer = build_optimizer(model, config.optim)
    assert type(optimizer) is torch.optim.AdamW
    assert {group["base_lr"] for group in optimizer.param_groups} == {PRESETS["baseline"].optim.head_lr}
    assert config.optim.schedule == "constant" and config.optim.label_smoothing == 0.0
    assert (config.train.batch_size, config.model.image_size) == (32, 224)  # the study's steps are of 32


def test_fine_grained_is_trained_as_the_paper_says():
    config = PRESETS["fine_grained"]
    model = trained(config.model, 200)
    assert model.scra is not None and model.dropout.p == 0.45
    assert all(p.requires_grad for p in model.parameters())
    optimizer = build_optimizer(model, config.optim)
    assert type(optimizer) is torch.optim.Adam
    assert {group["base_lr"] for group in optimizer.param_groups} == {1e-4}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 1e-5}
    steps = 7  # an epoch
    factors = [lr_at(epoch * steps, 30 * steps, config.optim) for epoch in range(30)]
    assert factors == pytest.approx([0.1 ** (epoch // 5) for epoch in range(30)])
    augment, train = config.augment, config.train
    assert (augment.flip, augment.rotation, augment.rotation_p) == (0.25, 15.0, 0.25)
    assert (augment.jitter, augment.hue) == (0.25, 0.05)
    assert (train.epochs, train.batch_size, config.model.image_size) == (30, 128, 224)
    assert config.optim.label_smoothing == config.optim.l2_sp == 0.0 and config.data.resize == "squash"
    assert (augment.mixup, augment.cutmix, augment.erasing) == (0.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("profile", ["quick", "offline", "full"])
def test_every_row_can_be_configured_and_differs_from_the_one_it_is_compared_with(name, profile, monkeypatch):
    monkeypatch.setenv("TINY_IMAGENET_DIR", "somewhere")
    plan = Plan(STUDIES[name], profile)
    rows = {row.name: row for row in plan.study.rows_of(profile)}
    assert rows and all(row.against in ("", *rows) for row in rows.values())
    configs = {row.name: plan.config(row, 0) for row in rows.values()}
    for row in rows.values():
        assert configs[row.name].arm == name
        if row.against:
            assert configs[row.name] != configs[row.against]


def test_as_many_images_of_every_class_leaves_none_out():
    plan = Plan(STUDIES["animals40"], "offline", "somewhere")
    config = plan.config(plan.study.row("as many images of every class"), 0)
    assert (config.data.sampling, config.data.draws_per_class, config.data.fit_per_class) == (
        "balanced",
        250,
        0,
    )
    recipe = plan.config(plan.study.row("recipe as written"), 0)
    assert replace(config, data=replace(config.data, draws_per_class=0)) == recipe


# What learns, by torchvision's networks: the modules of each.
LEARNS = {
    "VGG-16": ("vgg16", ("features", "classifier.0", "classifier.3")),
    "Inception-V3": ("inception_v3", ("Mixed_7b", "Mixed_7c")),
}


@pytest.mark.parametrize("name", [*animals.HUB_BACKBONES, *animals.PACKAGE_BACKBONES, "VGG-16"])
def test_every_backbone_of_the_animals_can_be_built(name):
    """Without weights and memory; what of it learns is compared with torchvision's modules of that name."""
    profile = "offline" if name in animals.PACKAGE_BACKBONES else "full"
    plan = Plan(STUDIES["animals40"], profile, "somewhere")
    model = plan.config(plan.study.row(name), 0).model
    tag = model.backbone.partition("@")[0]
    building._require_known(tag)
    with torch.device("meta"):
        backbone = building._created(tag, model.drop_path)
        backbone.reset_classifier(0)
        map_shape = building._map_shape(backbone, tag, model.image_size)
        built = building.Classifier(backbone, 40, model, map_shape)
        assert built(torch.zeros(2, 3, model.image_size, model.image_size)).shape == (2, 40)
        learning = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        if name in LEARNS:
            other = getattr(torchvision.models, LEARNS[name][0])(init_weights=False)
            parts = [other.get_submodule(part) for part in LEARNS[name][1]]
            assert learning == sum(p.numel() for part in parts for p in part.parameters())
    assert learning > 0


def test_the_first_row_of_a_recipe_is_the_preset():
    for name, row in (
        ("animals40", "recipe as written"),
        ("fine_grained", "baseline + augmentation + dropout + SCRA"),
    ):
        plan = Plan(STUDIES[name], "full", "somewhere")
        assert plan.config(plan.study.row(row), 0).model == PRESETS[name].model
        assert plan.config(plan.study.row(row), 0).augment == PRESETS[name].augment
        assert plan.config(plan.study.row(row), 0).optim == PRESETS[name].optim


def test_the_rows_of_table_1_add_what_their_names_say():
    plan = Plan(STUDIES["fine_grained"], "full", "somewhere")
    for row in plan.study.rows:
        config = plan.config(row, 0)
        has = {
            "augmentation": not config.augment.is_identity,
            "L2-SP": config.optim.l2_sp == 2 * 0.01,
            "dropout": config.model.dropout == 0.45,
            "SCRA": config.model.scra,
        }
        assert {name for name, there in has.items() if there} == set(row.name.split(" + ")[1:])


def test_a_profile_shows_the_rows_whose_weights_it_has():
    names = {
        profile: {row.name for row in STUDIES["dogs20"].rows_of(profile)} for profile in ("offline", "full")
    }
    assert names["full"] == {"MobileNetV2", "ConvNeXt-Tiny", "ConvNeXt-Base"}
    assert not names["full"] & names["offline"] and len(names["offline"]) == 3


# ------------------------------------------------------------------------------------- costs and reports


def test_costs_are_counted_and_stand_beside_those_reported():
    table = fine_grained.costs(preset("fine_grained", "full")).set_index(["row", "classes"])
    plain, gated = table.loc["without SCRA"], table.loc["with SCRA"]
    # Woo et al. 2023, table 11: 198 M and 34.4 G multiply-adds with 1,000 classes.
    assert plain.loc[300, "parameters_m"] == pytest.approx(197.957 - 0.7 * 1.537, abs=2e-3)
    assert (plain["gflops"] == 68.72).all() and (plain["reported_gflops"] == 68.72).all()
    added = gated["parameters_m"] - plain["parameters_m"]
    assert added.to_numpy() == pytest.approx((192 * 192 + 192) / 1e6, abs=1e-3)
    assert (gated["gflops"] - plain["gflops"]).to_numpy() == pytest.approx(
        2 * 192 * 192 * 56 * 56 / 1e9, abs=0.02
    )
    assert plain.loc[300, "parameters_m"] == gated.loc[300, "reported_parameters_m"] == 196.881
    committed = pd.read_csv(reported.FILE.with_name("fine_grained") / "costs.csv")
    pd.testing.assert_frame_equal(committed, table.reset_index()[list(committed.columns)])


def test_a_row_that_computes_too_much_is_refused():
    fine_grained.require_few_flops(104.9, 100)
    with pytest.raises(SetupError, match="105.10 GFLOPs are 5.1% more"):
        fine_grained.require_few_flops(105.1, 100)


def test_reported_numbers_are_the_documents():
    lines = {
        name: pd.DataFrame(read["lines"]) for name, read in json.loads(reported.FILE.read_text()).items()
    }
    assert set(lines) == set(FAMILY)
    dogs = lines["dogs20"]
    assert (dogs["n_correct"] / dogs["n"]).to_numpy() == pytest.approx(dogs["accuracy"].to_numpy(), abs=1e-6)
    assert list(lines["animals40"]["accuracy"]) == [0.96, 0.591, 0.58]
    assert len(lines["fine_grained"]) == 13 and lines["fine_grained"]["accuracy"].max() == 0.904
    for name, table in lines.items():
        rows = {row.name for row in STUDIES[name].rows}
        assert set(table["row"]) <= rows and set(table.get("stand_in", pd.Series(dtype=str)).dropna()) <= rows


def test_what_is_not_measured_says_how_it_would_be(tmp_path):
    table = reported.beside_reported(STUDIES["dogs20"], tmp_path)
    own, stand_in = reported.HEADER[2:]
    for column, profile in ((own, "full"), (stand_in, "offline")):
        asked = f"not run: `python -m src.experiment ablation --preset dogs20 --profile {profile} --data DIR"
        assert table[column].str.startswith(asked).all()
    assert '--rows "ConvNeXt-Base"`' in table[own][0]
    assert '--rows "EfficientNet-Lite2 (for ConvNeXt-Base)"`' in table[stand_in][0]
    assert "91.87 % [86.60, 95.19] of 160" in table["reported"].iloc[0]
    both = reported.beside_reported(STUDIES["animals40"], tmp_path)
    assert len(both) == 1 and "96.00 %" in both["reported"][0] and "59.10 %" in both["reported"][0]


def test_a_measured_stand_in_stands_beside_the_study_s_own_images(tmp_path):
    from test_ablation import record

    from src.studies.table import write_summary, write_table

    study, name = STUDIES["dogs20"], "EfficientNet-Lite2 (for ConvNeXt-Base)"
    runs = pd.DataFrame(
        [record(name, seed, a, data="tiny-imagenet, a stand-in") for seed, a in ((0, 0.5), (1, 0.6))]
    )
    own, folder = (study.path(tmp_path, is_stand_in) for is_stand_in in (False, True))
    folder.mkdir(parents=True)
    write_table(study, folder, runs)
    write_summary(study, folder)
    line = reported.beside_reported(study, tmp_path).iloc[0]
    words = f"{name}: 55.00 ± 7.07 % (2 seeds), loss {runs['valid_loss'].mean():.4f}"
    run_on = "; tiny-imagenet, a stand-in; `some_net.in1k`, 64 px, a CPU (2 CPU cores)"
    assert line["here, on the stand-in"] == words + run_on
    assert line["here"].startswith("not run: ") and "--profile full" in line["here"]
    assert line["reported"].endswith(" of 160, loss 0.3241, 340 ms a step")
    assert reported.markdown(pd.DataFrame([line])).count("\n") == 2
    # One of the seeds was timed: in the file the other has an empty cell.
    write_table(study, folder, runs.assign(predict_ms=[np.nan, 41.6]))
    timed = reported.beside_reported(study, tmp_path).iloc[0]["here, on the stand-in"]
    assert timed == f"{words}, 42 ms a step{run_on}"
    write_table(study, own, pd.DataFrame([record("ConvNeXt-Base", 0, 0.9, data="stanford-dogs")]))
    write_summary(study, own)
    both = reported.beside_reported(study, tmp_path).iloc[0]
    assert both["here"].startswith("90.00 % (1 seed), loss ") and "; stanford-dogs; " in both["here"]
    assert both["here, on the stand-in"] == timed


def test_the_comparison_is_a_file_too(tmp_path):
    study = STUDIES["fine_grained"]
    table = reported.write_beside_reported(study, tmp_path)
    read = pd.read_csv(tmp_path / "studies" / "fine_grained" / "beside_reported.csv")
    pd.testing.assert_frame_equal(read, table)
    assert list(read.columns) == list(reported.HEADER) and len(read) == 6
    assert not read["reported"].str.contains("loss|ms a step").any()  # which that study does not say


def test_the_readme_says_how_the_rows_differ_from_the_preset():
    study = STUDIES["fine_grained"]
    own, row = preset("fine_grained", "offline"), Plan(study, "offline", "somewhere").config(study.rows[0], 0)
    assert own.data.fit_per_class == 0
    text = " ".join((Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8").split())
    theirs, ours = (f"{c.train.epochs} epochs at {c.model.image_size} px on" for c in (own, row))
    assert f"{theirs} all images there, {ours} {row.data.fit_per_class} images a class here" in text


def test_the_rows_of_transfer_are_not_run_without_their_pretraining(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("src.studies.run.run_study", lambda *_: pytest.fail("without a pretraining"))
    monkeypatch.setattr("src.studies.transfer.run_transfer", lambda *a: asked.append(a) or Path("folder"))
    monkeypatch.setattr("src.commands.summary_of", str)
    assert main(["ablation", "--preset", "transfer40", "--profile", "quick", "--seeds", "3"]) == 0
    ((plan, _, _, seeds),) = asked
    assert plan.study is STUDIES["transfer40"] and seeds == [3]


def test_a_row_of_a_timed_study_says_how_long_it_takes(pets, weights, tmp_path, monkeypatch):
    """Eight `valid` images make a step of 32, all of it through the whole network."""
    seen, waited = [], iter(np.cumsum([0, 9, 0, 0.5, 0, 0.1, 0, 0.2, 0, 0.3, 0, 0.4]).tolist())
    monkeypatch.setattr(study_run, "time", SimpleNamespace(perf_counter=lambda: next(waited)))
    original = study_run.one_pass

    def counted(model, batches, device, label):
        seen.append(original(model, batches, device, label))
        return seen[-1]

    monkeypatch.setattr(study_run, "one_pass", counted)
    plan = Plan(STUDIES["ablation"], "offline", str(pets), tiny.small(weights))
    paths = Paths(tmp_path / "results", tmp_path / "runs", tmp_path / "cache")
    record = study_run.run_row(plan.job("baseline", 0), paths, timed=True)
    assert record["predict_ms"] == 300.0  # the median of all steps but the first
    assert [logits.shape for logits in seen] == [(32, 2)] * 6
    np.testing.assert_allclose(seen[0][:8], seen[0][8:16], atol=1e-5)
    assert STUDIES["dogs20"].timed and not STUDIES["ablation"].timed


def test_the_figure_of_transfer_counts_images_a_class(tmp_path, monkeypatch):
    from test_ablation import record

    from src.studies import table as tables

    study, drawn = STUDIES["transfer40"], []
    monkeypatch.setattr(tables, "transfer_figure", lambda *given: drawn.append(given))
    monkeypatch.setattr(tables, "save", lambda *_: None)
    n_fit = {"10": 400, "50": 2000, "all": 19_000}
    runs = [
        record(f"{arm}, {n} images a class", 0, 0.5, n_fit=n_fit[n])
        for n in n_fit
        for arm in ("frozen", "fine-tuned")
    ]
    tables.write_table(study, tmp_path, pd.DataFrame(runs))
    tables.write_summary(study, tmp_path)
    ((_, table, axis, note),) = drawn
    assert axis == "images a class to train on" and "every fifth (40 of" in note
    assert sorted(set(table["images"])) == [10, 50, 475]
    tables.write_table(study, tmp_path, pd.DataFrame(runs[-2:]))  # nothing says how many classes there are
    tables.write_summary(study, tmp_path)
    assert drawn[1][2] == "images to train on" and set(drawn[1][1]["images"]) == {19_000}
