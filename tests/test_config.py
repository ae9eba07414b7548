"""Configuration: presets, profiles, JSON, and every wrong key or value refused by name."""

from __future__ import annotations

import json

import pytest

from src import SetupError
from src.config import (
    BASELINE,
    IMPROVEMENT,
    PRESETS,
    PROFILES,
    AugmentConfig,
    Config,
    differences,
    field_names,
    from_dict,
    get,
    preset,
    to_dict,
    with_fields,
)

EVERY_RUN = [(arm, profile) for arm in PRESETS for profile in PROFILES]


@pytest.mark.parametrize(("arm", "profile"), EVERY_RUN)
def test_json_round_trip(arm, profile):
    config = preset(arm, profile, {"augment.crop_scale": (0.25, 0.75), "train.seed": 7})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(("arm", "profile"), EVERY_RUN)
def test_profile_changes_sizes_and_sources_but_never_the_method(arm, profile):
    may_change = {
        "profile", "data.source", "model.backbone", "model.weights", "model.image_size", "optim.lr",
        "train.batch_size", "train.epochs",
    }  # fmt: skip
    config = preset(arm, profile)
    changed = {name for name in field_names() if get(config, name) != get(PRESETS[arm], name)}
    no_mirrored_digits = {"augment.flip"} if (arm, profile) == ("improvement", "quick") else set()
    assert changed - may_change == no_mirrored_digits


@pytest.mark.parametrize("profile", PROFILES)
def test_both_arms_start_from_the_same_network_and_data(profile):
    a, b = preset("baseline", profile), preset("improvement", profile)
    assert a.data == b.data
    same = ("backbone", "weights", "image_size", "head_init")
    assert [getattr(a.model, name) for name in same] == [getattr(b.model, name) for name in same]


def test_presets_are_the_methods_of_the_study():
    model, train = BASELINE.model, BASELINE.train
    assert (model.trainable, model.head, BASELINE.augment.is_identity) == ("none", "plain", True)
    assert (BASELINE.optim.head_lr, train.monitor, train.patience) == (1e-3, "loss", 5)
    model = IMPROVEMENT.model
    assert (model.trainable, model.head, model.dropout) == ("all", "attention", 0.2)
    assert (IMPROVEMENT.optim.schedule, IMPROVEMENT.augment.randaugment_ops) == ("cosine", 2)


def test_field_names_cover_every_field_once():
    names = field_names()
    assert len(names) == len(set(names)) and "data" not in names
    assert {"arm", "data.protocol", "augment.crop_scale", "train.seed"} <= set(names)


def test_overrides_come_after_the_profile():
    config = preset("baseline", "quick", {"train.epochs": 3, "model.image_size": 32})
    assert (config.train.epochs, config.model.image_size, config.data.source) == (3, 32, "digits")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.epochs", "12", 12),
        ("train.seed", "1e3", 1000),
        ("optim.lr", "5e-4", 5e-4),
        ("augment.crop_scale", "0.5,1", (0.5, 1.0)),
        ("train.cache_features", "false", False),
        ("data.skip_bad", "True", True),
        ("data.path", "some/where", "some/where"),
    ],
)
def test_strings_are_read_as_the_field_s_type(name, text, value):
    read = get(with_fields(BASELINE, {name: text}), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.epochs", "many"),
        ("train.epochs", "1.5"),
        ("train.epochs", None),
        ("train.epochs", "nan"),
        ("train.epochs", "inf"),
        ("train.epochs", ""),
        ("optim.lr", "fast"),
        ("optim.lr", "nan"),
        ("train.cache_features", "maybe"),
        ("augment.crop_scale", "0.5"),
        ("augment.crop_scale", "0,1"),
        ("augment.crop_scale", "0.9,0.5"),
        ("augment.crop_scale", "0.5,1.5"),
        ("augment.crop_scale", "nan,1"),
        ("train.epochs", 0),
        ("train.batch_size", 1),
        ("train.seed", -1),
        ("train.seed", 2**40),
        ("model.image_size", 31),
        ("model.dropout", 1.0),
        ("optim.warmup_fraction", 1.01),
        ("optim.label_smoothing", -0.1),
        ("augment.flip", 2),
        ("data.holdout_per_class", 0),
        ("data.source", "kaggle"),
        ("data.protocol", "test"),
        ("model.head", "cbam"),
        ("model.head_init", "ones"),
        ("model.trainable", "head"),
        ("optim.schedule", "step"),
        ("train.monitor", "f1"),
    ],
)
def test_wrong_value_is_named(name, value):
    with pytest.raises(SetupError, match=name.replace(".", r"\.")) as caught:
        with_fields(BASELINE, {name: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["train.epoch", "train", "train.seed.more", "trian.seed", "", "a.b.c"])
def test_unknown_key_lists_the_known_ones(name):
    with pytest.raises(SetupError, match="is unknown") as caught:
        with_fields(BASELINE, {name: "1"})
    assert repr(name) in str(caught.value) and "train.epochs" in str(caught.value)


def test_unknown_arm_and_profile_name_the_choices():
    with pytest.raises(SetupError, match="'improved' is unknown.*baseline, improvement"):
        preset("improved", "quick")
    with pytest.raises(SetupError, match="'fast' is unknown.*quick, offline, full"):
        preset("baseline", "fast")
    with pytest.raises(SetupError, match="arm"):
        Config(arm="other")


def test_from_dict_refuses_unknown_missing_and_misplaced_keys():
    def changed(edit) -> dict:
        data = to_dict(BASELINE)
        edit(data)
        return data

    for edit, named in [
        (lambda d: d["train"].update(momentum=0.9), "train.momentum"),
        (lambda d: d["optim"].pop("lr"), "optim.lr"),
        (lambda d: d.update(extra={}), "extra"),
        (lambda d: d.update(model="convnext"), "model"),
    ]:
        with pytest.raises(SetupError, match=named):
            from_dict(changed(edit))
    with pytest.raises(SetupError, match="top level"):
        from_dict([])


def test_differences_name_key_and_both_values():
    other = with_fields(BASELINE, {"train.seed": 3, "augment.crop_scale": (0.5, 1.0)})
    assert differences(to_dict(BASELINE), to_dict(BASELINE)) == []
    assert differences(to_dict(other), to_dict(BASELINE)) == [
        "augment.crop_scale: [1.0, 1.0] -> [0.5, 1.0]",
        "train.seed: 0 -> 3",
    ]
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a: None -> 1", "b.c: 2 -> None"]


def test_run_names_keep_runs_apart():
    runs = {
        preset(arm, profile, {"train.seed": seed, "data.protocol": protocol}).run_name
        for arm, profile in EVERY_RUN
        for seed in (0, 1)
        for protocol in ("holdout", "published")
    }
    assert len(runs) == len(EVERY_RUN) * 4


def test_identity_augmentation_is_recognised():
    assert AugmentConfig().is_identity and AugmentConfig(randaugment_magnitude=3).is_identity
    changes = {"flip": 0.5, "randaugment_ops": 1, "erasing": 0.1, "crop_padding": 4, "crop_scale": (0.5, 1)}
    for name, value in changes.items():
        assert not AugmentConfig(**{name: value}).is_identity
