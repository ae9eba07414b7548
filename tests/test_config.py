"""Configuration: presets, profiles, JSON, and every wrong key or value refused by name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src import SetupError, config
from src.config import (
    AS_RUN_BASELINE,
    AS_RUN_IMPROVEMENT,
    BASELINE,
    BEST,
    CHOICES,
    IMPROVEMENT,
    PRESETS,
    PROFILES,
    RANGES,
    AfterConfig,
    AugmentConfig,
    Config,
    ModelConfig,
    TrainConfig,
    differences,
    field_names,
    from_dict,
    get,
    preset,
    probe_of,
    to_dict,
    with_fields,
)

EVERY_RUN = [(arm, profile) for arm in PRESETS for profile in PROFILES]


# Fields that do nothing, and are refused, unless another is set as well.
ALONGSIDE = {
    "model.relative_position": {"model.head": "attention"},
    "model.class_queries": {"model.head": "cross_attention"},
    "optim.l2_sp": {"model.trainable": "all"},
    "optim.step_parts": {"optim.schedule": "step"},
    "data.fold": {"data.folds": 20},
    "data.draws_per_class": {"data.sampling": "balanced"},
}


def base(name: str) -> Config:
    """The baseline, or what of it the field acts in."""
    return with_fields(BASELINE, ALONGSIDE.get(name, {}))


def changed(name: str) -> Config:
    """`base` with another, allowed value in one field."""
    now = get(BASELINE, name)
    if name in CHOICES:
        values = CHOICES[name]
    elif name in RANGES:
        values = (64, *RANGES[name], 0.5)
    else:
        values = {bool: (True, False), str: ("other",), int: (7,), tuple: ((0.25, 0.75),)}[type(now)]
    for value in values:
        try:
            config = with_fields(base(name), {name: value})
        except SetupError:
            continue
        if get(config, name) != now:
            return config
    raise AssertionError(name)


@pytest.mark.parametrize(("arm", "profile"), EVERY_RUN)
def test_json_round_trip(arm, profile):
    config = preset(arm, profile, {"augment.crop_scale": (0.25, 0.75), "train.seed": 7})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_field_goes_to_json_and_back():
    """Alone in another value: it is that field which differs, and it comes back as it was."""
    for name in field_names():
        config = changed(name)
        again = from_dict(json.loads(json.dumps(to_dict(config))))
        assert again == config != base(name), name
        [line] = differences(to_dict(config), to_dict(base(name)))
        assert line.startswith(f"{name}: ")


def test_every_number_has_a_range_and_every_name_its_choices():
    """What is free: where data and weights are, what is hashed; a pair has a check of its own."""
    free = {"data.path", "data.split_seed", "model.backbone", "model.weights", "augment.crop_scale"}
    bounded = {name for name in field_names() if not isinstance(get(BASELINE, name), bool)}
    assert CHOICES.keys() | RANGES.keys() == bounded - free
    for name, (low, high) in RANGES.items():
        assert low <= get(BASELINE, name) <= high


@pytest.mark.parametrize(("arm", "profile"), EVERY_RUN)
def test_profile_changes_sizes_and_sources_but_never_the_method(arm, profile):
    may_change = {
        "profile", "data.source", "model.backbone", "model.weights", "model.image_size", "optim.lr",
        "train.batch_size", "train.epochs",
    }  # fmt: skip
    if arm in ("animals40", "dogs20", "fine_grained"):  # on other data: how they are cut and stored
        may_change |= {"data.classes", "data.stored_size", "data.resize", "data.holdout_per_class"}
    config = preset(arm, profile)
    changed = {name for name in field_names() if get(config, name) != get(PRESETS[arm], name)}
    exceptions = {
        # No mirrored digits, too few held out to count, and none of ImageNet's classes.
        ("improvement", "quick"): {"augment.flip", "train.monitor"},
        ("pretrain", "quick"): {"augment.flip"},
        ("best", "quick"): {"augment.flip", "train.monitor", "after.tta", "model.head_init"},
        ("best", "offline"): {"augment.randaugment_ops"},
        ("best", "full"): {"train.start_size"},
        ("fine_grained", "quick"): {"optim.head_lr"},  # one rate for all parameters, as documented
        ("fine_grained", "offline"): {"optim.head_lr"},
    }
    assert changed - may_change == exceptions.get((arm, profile), set())


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


def test_the_best_preset_is_the_improvement_with_what_the_ablation_speaks_for():
    changed = {name for name in field_names() if get(BEST, name) != get(IMPROVEMENT, name)}
    assert changed == {
        "arm", "model.backbone", "model.head", "model.head_init", "after.tta", "after.temperature",
    }  # fmt: skip
    full = preset("best", "full")
    assert [full.size_at(epoch) for epoch in (0, 4, 8, 11)] == [192, 256, 288, 288]


def test_presets_as_run_are_what_the_notebooks_ran():
    """Two pretrained weights, small batches, and a head that reads one token."""
    a, b = AS_RUN_BASELINE, AS_RUN_IMPROVEMENT
    assert (a.model.backbone, b.model.backbone) == ("convnext_tiny.in12k_ft_in1k", "convnext_tiny.fb_in1k")
    assert (a.model.trainable, a.model.head, b.model.trainable, b.model.head) == (
        "none", "plain", "last_stage", "as_run",
    )  # fmt: skip
    assert a.train.batch_size == b.train.batch_size == 32
    assert a.augment.is_identity and b.augment.flip == 0
    assert (a.caches_features, b.caches_features) == (True, False)


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
        ("optim.schedule", "linear"),
        ("optim.optimizer", "sgd"),
        ("optim.step_parts", 0),
        ("train.monitor", "f1"),
        ("data.fit_per_class", -1),
        ("data.imbalance", 0.5),
        ("data.sampling", "random"),
        ("data.resize", "pad"),
        ("data.folds", -1),
        ("data.folds", 21),
        ("data.fold", -1),
        ("augment.rotation", 181),
        ("augment.rotation_p", 1.5),
        ("augment.jitter", -0.1),
        ("augment.jitter", 1.1),
        ("augment.hue", 0.6),
        ("augment.trivial_augment", "twice"),
        ("augment.cutout", -1),
        ("augment.mixup", -0.1),
        ("augment.cutmix", "nan"),
        ("model.test_size", 31),
        ("model.test_size", 2048),
        ("model.head_init_scale", -1),
        ("model.drop_path", 1.0),
        ("model.attention_layers", 0),
        ("model.attention_heads", 0),
        ("model.attention_gate", "inf"),
        ("model.class_queries", 2),
        ("optim.layer_decay", 0),
        ("optim.layer_decay", 1.01),
        ("optim.class_weights", "some"),
        ("optim.l2_sp", -1),
        ("train.micro_batch", -1),
        ("train.start_size", 31),
        ("train.start_size", 225),
        ("train.ema_decay", 1),
        ("train.ema_decay", -0.1),
        ("train.probe_epochs", 0),
        ("after.soup_epochs", -1),
        ("after.wise_ft", "perhaps"),
        ("after.tta", "five_crop"),
        ("after.temperature", 1.5),
    ],
)
def test_wrong_value_is_named(name, value):
    with pytest.raises(SetupError, match=name.replace(".", r"\.")) as caught:
        with_fields(BASELINE, {name: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("head", CHOICES["model.head"])
@pytest.mark.parametrize("head_init", CHOICES["model.head_init"])
def test_a_head_with_new_layers_before_its_classifier_starts_at_random(head, head_init):
    changes = {"model.head": head, "model.head_init": head_init}
    if head in ("mlp", "as_run") and head_init != "random":
        said = f"head_init = '{head_init}' does nothing with model.head = '{head}'.*plain, attention"
        with pytest.raises(SetupError, match=said):
            with_fields(BASELINE, changes)
    else:
        assert with_fields(BASELINE, changes).model.head_init == head_init


def test_sizes_grow_but_never_shrink():
    largest = with_fields(BASELINE, {"train.start_size": 224})
    assert largest.train.start_size == largest.model.image_size
    with pytest.raises(SetupError, match="train.start_size = 225 is larger than model.image_size = 224"):
        with_fields(BASELINE, {"train.start_size": 225})
    with pytest.raises(SetupError, match="train.start_size = 128 is larger than model.image_size = 96"):
        Config("best", model=ModelConfig(image_size=96), train=TrainConfig(start_size=128))


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


OF_OTHERS = {"randaugment_magnitude": 3, "rotation_p": 0.3}


def test_identity_augmentation_is_recognised():
    """Every field of it changes an image, but for those of ops and rotations that are not there."""
    assert AugmentConfig().is_identity and AugmentConfig(**OF_OTHERS).is_identity
    for field in dataclasses.fields(AugmentConfig):
        augment = changed(f"augment.{field.name}").augment
        assert augment.is_identity == (field.name in OF_OTHERS), field.name
    assert not AugmentConfig(**OF_OTHERS, flip=0.5).is_identity


# ------------------------------------------------------------------------------------ derived from fields


def test_features_are_cached_where_every_epoch_shows_a_frozen_backbone_the_same_images():
    """Of all fields changed alone, these are the ones that end it."""
    assert BASELINE.caches_features
    ending = {n for n in field_names() if base(n).caches_features and not changed(n).caches_features}
    images = {f"augment.{f.name}" for f in dataclasses.fields(AugmentConfig) if f.name not in OF_OTHERS}
    assert ending == images | {
        "model.trainable", "model.scra", "model.test_size",
        "train.start_size", "train.cache_features", "after.tta",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({"model.test_size": 224}, True),  # the size of training
        ({"model.trainable": "last_two_blocks"}, False),
        ({"after.tta": "ten_crop"}, False),
        ({"model.head": "mlp", "model.dropout": 0.5, "model.drop_path": 0.5}, True),
        ({"after.soup_epochs": 3, "after.wise_ft": True, "after.temperature": True}, True),
        ({"train.ema_decay": 0.9, "optim.class_weights": True, "data.sampling": "balanced"}, True),
    ],
)
def test_features_are_cached_or_not(changes, cached):
    assert with_fields(BASELINE, changes).caches_features == cached


def test_prediction_has_the_size_of_training_unless_it_is_given():
    assert ModelConfig(image_size=96).predicts_at == 96
    assert ModelConfig(image_size=96, test_size=128).predicts_at == 128


@given(epochs=st.integers(1, 60), sizes=st.tuples(st.integers(32, 512), st.integers(32, 512)))
def test_sizes_grow_evenly_to_a_last_third_at_full_size(epochs, sizes):
    first, last = sorted(sizes)
    config = Config(
        "best",
        model=ModelConfig(image_size=last),
        train=TrainConfig(epochs=epochs, start_size=first),
    )
    sides = [config.size_at(epoch) for epoch in range(epochs)]
    n_last = max(1, epochs // 3)
    assert sides[-n_last:] == n_last * [last]
    assert sides == sorted(sides)
    assert all(side % 32 == 0 or side == last for side in sides)
    growing = epochs - n_last
    for epoch, side in enumerate(sides[:growing]):
        line = first + (last - first) * epoch / growing
        assert side == last or abs(side - line) <= 16  # the nearest multiple of 32
        assert side <= last
    if growing and first % 32 == 0:
        assert sides[0] == first


@given(epochs=st.integers(1, 60), size=st.integers(32, 512))
def test_sizes_stay_where_they_need_not_grow(epochs, size):
    config = Config("best", model=ModelConfig(image_size=size), train=TrainConfig(epochs=epochs))
    assert {config.size_at(epoch) for epoch in range(epochs)} == {size}


def test_sizes_by_hand():
    config = with_fields(BASELINE, {"train.start_size": 128, "train.epochs": 9})
    assert [config.size_at(epoch) for epoch in range(9)] == [128, 128, 160, 192, 192, 192, 224, 224, 224]


@pytest.mark.parametrize("arm", PRESETS)
def test_the_probe_is_a_plain_frozen_linear_classifier(arm):
    """Whatever else the run that asks for it has."""
    changes = {
        "data.source": "digits", "data.fit_per_class": 7, "data.sampling": "balanced",
        "augment.flip": 0.5, "augment.mixup": 0.4, "augment.trivial_augment": True,
        "model.backbone": "some.tag", "model.weights": "some.file", "model.image_size": 96,
        "model.test_size": 128, "model.head": "attention", "model.head_init": "probe",
        "model.head_init_scale": 0.1, "model.trainable": "all", "model.scra": True, "model.dropout": 0.3,
        "model.drop_path": 0.2, "model.attention_layers": 2, "optim.lr": 3e-4, "optim.head_lr": 0.5,
        "optim.class_weights": True, "optim.l2_sp": 1.0, "optim.label_smoothing": 0.1,
        "train.epochs": 30, "train.probe_epochs": 4, "train.seed": 9, "train.start_size": 32,
        "train.ema_decay": 0.99, "train.compile": True, "train.grad_checkpointing": True,
        "train.monitor": "accuracy", "after.soup_epochs": 2, "after.wise_ft": True, "after.tta": "flip",
        "after.temperature": True,
    }  # fmt: skip
    config = with_fields(PRESETS[arm], changes)
    probe = probe_of(config)
    assert probe.model == ModelConfig("some.tag", "some.file", 96, trainable="none", head="plain")
    assert probe.augment == AugmentConfig() and probe.after == AfterConfig()
    assert probe.optim == BASELINE.optim and probe.data == config.data
    assert probe.train == dataclasses.replace(BASELINE.train, epochs=4, seed=9)
    assert probe.caches_features and (probe.arm, probe.profile) == (config.arm, config.profile)
    assert config == with_fields(PRESETS[arm], changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.class_queries": True}, "class_queries = True does nothing with model.head = 'attention'"),
        (
            {"model.head": "plain", "model.relative_position": True},
            "relative_position = True does nothing with model.head = 'plain'",
        ),
        (
            {"model.trainable": "none", "optim.l2_sp": 0.1},
            "l2_sp = 0.1 does nothing with model.trainable = 'none'",
        ),
    ],
)
def test_a_field_that_would_do_nothing_is_refused(changes, said):
    with pytest.raises(SetupError, match=said):
        with_fields(IMPROVEMENT, changes)


# What the presets' docstrings say of results

RESULTS = Path(__file__).resolve().parent.parent / "results"
PERCENTAGES = r"\d+(?:\.\d+)?(?:(?:, | and )\d+(?:\.\d+)?)* %"  # "89.49, 89.48 and 78.62 %", or one


def of_results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def written_below() -> dict[str, str]:
    """Preset -> the docstring below it, on one line."""
    lines = ast.parse(inspect.getsource(config)).body
    return {
        line.targets[0].id: " ".join(below.value.value.split())
        for line, below in pairwise(lines)
        if isinstance(line, ast.Assign) and isinstance(below, ast.Expr)
    }


def known_of(name: str) -> list[float]:
    """Every share, in percent, that the docstring of a preset may name."""
    study = of_results("study.json")
    reported = of_results("studies/reported.json")
    shares = [line["accuracy"] for line in reported.get(name.lower(), {"lines": []})["lines"]]
    if name in ("AS_RUN_BASELINE", "AS_RUN_IMPROVEMENT", "BEST"):
        shares.append(
            study["baseline" if name == "AS_RUN_BASELINE" else "improvement"]["valid_accuracy"]["value"]
        )
    if (RESULTS / (arm := name.capitalize()) / "metrics.json").exists():
        shares.append(of_results(f"{arm}/metrics.json")["accuracy"])
        history = pd.read_csv(RESULTS / arm / f"{arm.lower()}_history.csv").set_index("epoch")
        chosen = history.loc[of_results(f"{arm}/metrics.json")["best_epoch"]]
        shares += [chosen["fit_accuracy"], chosen["holdout_accuracy"]]
    if name == "BEST":
        shares.append(of_results("ablation/best_last_two_blocks.json")["accuracy"])
    return [100 * share for share in shares]


@pytest.mark.parametrize("arm", ["Baseline", "Improvement", "Best"])
def test_a_preset_says_what_its_run_measured(arm):
    found, said = of_results(f"{arm}/metrics.json"), written_below()[arm.upper()]
    for fact in (
        f"--profile {found['profile']} --data DIR`: {100 * found['accuracy']:.2f} % of `valid`",
        f"(n = {found['n']:,}, one seed), best epoch {found['best_epoch']} of {found['epochs']},",
        f", {found['seconds']['total'] / 60:.0f} minutes on 2 CPU cores (EfficientNet-Lite0,",
        f", {found['image_size']} px, `{found['protocol']}`)",
    ):
        assert fact in said
    assert found["backbone"] == "tf_efficientnet_lite0.in1k" and "2 CPU cores" in found["hardware"]


def test_every_percentage_in_a_preset_s_docstring_is_a_result():
    said = written_below()
    assert {"BASELINE", "IMPROVEMENT", "BEST", "AS_RUN_IMPROVEMENT", "DOGS20", "FINE_GRAINED"} <= set(said)
    n_checked = 0
    for name, text in said.items():
        values = [v for found in re.findall(PERCENTAGES, text) for v in re.findall(r"\d+(?:\.\d+)?", found)]
        known = known_of(name)
        for value in values:
            digits = len(value.partition(".")[2])
            assert any(f"{share:.{digits}f}" == value for share in known), (name, value, known)
        n_checked += len(values)
    assert n_checked > 15
