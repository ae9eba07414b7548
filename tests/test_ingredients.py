"""Every ingredient of the recipe reaches the network: switched off by mistake, it would change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from src.config import (
    AfterConfig,
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    with_fields,
)
from src.train import Trainer

BASE = Config(
    arm="improvement",
    augment=AugmentConfig(randaugment_ops=1),
    model=ModelConfig(backbone=tiny.CONVNEXT, image_size=tiny.SIZE, head="attention", attention_gate=0.5),
    optim=OptimConfig(lr=1e-3, head_lr=1e-2, weight_decay=0.01, schedule="cosine"),
    train=TrainConfig(epochs=3, batch_size=6),
)
# What training makes of the weights must differ from what it makes of them without the field.
INGREDIENTS = {
    "augment.flip": 1.0,
    "augment.crop_padding": 4,
    "augment.crop_scale": (0.3, 0.9),
    "augment.rotation": 30.0,
    "augment.rotation_p": 0.5,
    "augment.jitter": 0.4,
    "augment.hue": 0.3,
    "augment.randaugment_ops": 2,
    "augment.randaugment_magnitude": 20,
    "augment.trivial_augment": True,
    "augment.erasing": 1.0,
    "augment.cutout": 12,
    "augment.mixup": 1.0,
    "augment.cutmix": 1.0,
    "model.image_size": 96,
    "model.trainable": "last_stage",
    "model.head": "cross_attention",
    "model.head_init": "zero",
    "model.head_init_scale": 0.1,
    "model.dropout": 0.5,
    "model.drop_path": 0.5,
    "model.attention_layers": 2,
    "model.attention_heads": 1,
    "model.attention_gate": 0.1,
    "model.relative_position": True,
    "model.scra": True,
    "optim.optimizer": "adam",
    "optim.lr": 2e-3,
    "optim.head_lr": 2e-2,
    "optim.layer_decay": 0.5,
    "optim.weight_decay": 0.5,
    "optim.schedule": "constant",
    "optim.step_parts": 6,
    "optim.warmup_fraction": 0.5,
    "optim.label_smoothing": 0.3,
    "optim.class_weights": True,
    "optim.l2_sp": 10.0,
    "optim.clip_norm": 0.01,
    "data.sampling": "balanced",
    "train.epochs": 2,  # the end of the cosine
    "train.batch_size": 4,
    "train.start_size": 32,
    "train.ema_decay": 0.9,
    "train.seed": 1,
}
# Fields that act on another ingredient, which is on with them and without.
ALONGSIDE = {
    "augment.rotation_p": {"augment.rotation": 30.0},
    "optim.step_parts": {"optim.schedule": "step"},
}
# These change nothing that a network learns, or are tested where they act.
ELSEWHERE = {
    "model.backbone", "model.weights",  # test_model: which file is read
    "model.test_size",  # below: prediction
    "model.class_queries",  # below: with cross-attention
    "train.probe_epochs",  # test_experiment: with head_init = probe
    "train.monitor", "train.patience", "train.checkpoint_minutes",  # test_train: when to stop and to save
    "train.micro_batch", "train.cache_features", "train.compile", "train.grad_checkpointing",  # speed alone
}  # fmt: skip


def learned(folder, config: Config) -> dict[str, torch.Tensor]:
    """The best state after training `config` on tiny data, all of it drawn from the same seeds."""
    fields = {key: getattr(config.model, key) for key in MODEL_FIELDS}
    built = tiny.build(folder, wnids=("a", "b", "c", "d", "e"), seed=config.train.seed, **fields)
    built = dataclasses.replace(
        built, preprocess=dataclasses.replace(built.preprocess, size=config.model.image_size)
    )
    folder = folder / "run"
    folder.mkdir(exist_ok=True)
    trainer = Trainer(built.model, tiny.fit_data(built, config), config, tiny.device(5), folder)
    trainer.save = lambda: None
    while not trainer.finished:
        trainer.train_epoch()
        trainer.end_epoch()
    return trainer.best_state


MODEL_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name not in ("backbone", "weights", "image_size", "test_size")
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return learned(tmp_path_factory.mktemp("reference"), BASE)


def test_training_is_repeatable(tmp_path, reference):
    again = learned(tmp_path, BASE)
    assert all(torch.equal(tensor, again[name]) for name, tensor in reference.items())


@pytest.mark.parametrize("name", INGREDIENTS)
def test_an_ingredient_changes_what_is_learned(tmp_path, reference, name):
    base = with_fields(BASE, ALONGSIDE.get(name, {}))
    before = learned(tmp_path, base) if name in ALONGSIDE else reference
    state = learned(tmp_path, with_fields(base, {name: INGREDIENTS[name]}))
    assert not torch.equal(state["classifier.weight"], before["classifier.weight"])


def test_no_ingredient_is_left_out():
    sections = {"augment": AugmentConfig, "model": ModelConfig, "optim": OptimConfig, "train": TrainConfig}
    fields = {f"{section}.{f.name}" for section, kind in sections.items() for f in dataclasses.fields(kind)}
    assert fields == {name for name in INGREDIENTS if not name.startswith("data.")} | ELSEWHERE
    assert {f.name for f in dataclasses.fields(AfterConfig)} == {
        "soup_epochs", "wise_ft", "tta", "temperature",  # test_after
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(DataConfig)} == {
        "source", "path", "stored_size", "resize", "skip_bad",  # test_sources, test_store
        "classes",  # test_studies
        "protocol", "holdout_per_class", "split_seed", "folds", "fold",  # test_splits
        "fit_per_class", "imbalance",  # test_splits
        "sampling",  # above
        "draws_per_class",  # test_batches, test_studies
    }  # fmt: skip


def test_a_query_a_class_predicts_otherwise(tmp_path):
    one, many = (
        tiny.build(tmp_path, head="cross_attention", attention_gate=0.5, class_queries=queries).model.eval()
        for queries in (False, True)
    )
    assert one.attention.n_queries == 1 and many.attention.n_queries == 5
    x = torch.randn(3, 3, tiny.SIZE, tiny.SIZE)
    assert many(x).shape == one(x).shape == (3, 5)


def test_prediction_is_at_the_test_size(tmp_path):
    config = with_fields(BASE, {"model.test_size": 96})
    built = tiny.build(tmp_path, head="plain")
    data = tiny.fit_data(built, config)
    fit_side, holdout_side = (
        next(iter(batches.in_order()))[0].shape[-1] for batches in (data.fit, data.holdout)
    )
    assert (fit_side, holdout_side) == (tiny.SIZE, 96)
