"""The rows of the ablation: what is run, and what it is compared with."""

from __future__ import annotations

from src.studies.study import Row, Study, Times

# What every row of a profile shares: small enough for all rows and seeds, and the same for each.
BUDGETS = {
    "quick": {"train.epochs": 2, "data.fit_per_class": 20},
    "offline": {
        "model.image_size": 64,
        "train.epochs": 2,
        "train.batch_size": 32,  # as the study; 128 would leave few steps of so few images
        "data.fit_per_class": 100,
    },
    "full": {"train.epochs": 12},
}
# The improvement as written: single ingredients are added to it or taken from it.
RECIPE = "+ label smoothing (recipe)"

AS_RUN = (
    Row("baseline as run", "as_run_baseline"),
    Row("improvement as run", "as_run_improvement", against="baseline as run"),
)
# Each of these adds to the one above it.
LADDER = {
    "baseline": {},
    "+ full fine-tuning": {
        "model.trainable": "all",
        "optim.schedule": "cosine",
        "optim.warmup_fraction": 0.05,
        "optim.clip_norm": 1.0,
        "train.monitor": "accuracy",
    },
    "+ spatial attention": {"model.head": "attention"},
    "+ flips": {"augment.flip": 0.5},
    "+ RandAugment": {"augment.randaugment_ops": 2},
    "+ erasing": {"augment.erasing": 0.15},
    "+ dropout": {"model.dropout": 0.2},
    "+ weight decay": {"optim.weight_decay": 0.05},
    RECIPE: {"optim.label_smoothing": 0.1},
    "+ balanced sampling": {"data.sampling": "balanced"},
}
# Each of these changes the recipe alone. Those of the last lines share its training.
SINGLE = {
    "recipe, without attention": {"model.head": "plain"},
    "recipe, without flips": {"augment.flip": 0.0},
    "recipe, without RandAugment": {"augment.randaugment_ops": 0},
    "recipe, without erasing": {"augment.erasing": 0.0},
    "recipe, without dropout": {"model.dropout": 0.0},
    "recipe, without weight decay": {"optim.weight_decay": 0.0},
    "recipe, without label smoothing": {"optim.label_smoothing": 0.0},
    "head: one-token attention (as run)": {"model.head": "as_run"},
    "head: gate starts at 0.1": {"model.attention_gate": 0.1},
    "head: two attention layers": {"model.attention_layers": 2},
    "head: position bias": {"model.relative_position": True},
    "head: cross-attention, one query": {"model.head": "cross_attention"},
    "head: cross-attention, a query a class": {"model.head": "cross_attention", "model.class_queries": True},
    "head: MLP": {"model.head": "mlp"},
    "head: SCRA gate in the backbone": {"model.scra": True},
    "start: pretrained classifier's rows": {"model.head_init": "pretrained_rows"},
    "start: linear probe (LP-FT)": {"model.head_init": "probe"},
    "trained: head alone": {"model.trainable": "none"},
    "trained: last stage": {"model.trainable": "last_stage"},
    "trained: last two blocks": {"model.trainable": "last_two_blocks"},
    "learning rate × 0.3": {"optim.lr": Times(0.3, "optim.lr")},
    "learning rate × 3": {"optim.lr": Times(3, "optim.lr")},
    "layer decay 0.8": {"optim.layer_decay": 0.8},
    "TrivialAugment for RandAugment": {"augment.randaugment_ops": 0, "augment.trivial_augment": True},
    "random resized crops": {"augment.crop_scale": (0.35, 1.0)},
    "cutout for erasing": {"augment.erasing": 0.0, "augment.cutout": 16},
    "mixup": {"augment.mixup": 0.2},
    "CutMix": {"augment.cutmix": 1.0},
    "stochastic depth": {"model.drop_path": 0.1},
    "L2-SP": {"optim.l2_sp": 0.01},
    "moving average of weights": {"train.ema_decay": 0.99},
    "progressive resizing": {"train.start_size": 32},
    "tested larger": {"model.test_size": Times(1.5, "model.image_size")},
    "after: soup of epochs": {"after.soup_epochs": 2},
    "after: WiSE-FT": {"after.wise_ft": True},
    "after: mirrored views": {"after.tta": "flip"},
    "after: ten crops": {"after.tta": "ten_crop"},
    "after: temperature": {"after.temperature": True},
}
# Kinds of attention, left to `full`: at 64 px the last feature map has 2 x 2 places, too few to attend to.
OF_LARGE_MAPS = (
    "head: gate starts at 0.1",
    "head: two attention layers",
    "head: position bias",
    "head: cross-attention, one query",
    "head: cross-attention, a query a class",
)


def grid() -> tuple[Row, ...]:
    """Every row, each with all of its changes."""
    rows, changes, above = list(AS_RUN), {}, ""
    for name, added in LADDER.items():
        changes = changes | added
        rows.append(Row(name, "baseline", changes, above))
        above = name
    recipe = next(row for row in rows if row.name == RECIPE)
    for name, change in SINGLE.items():
        profiles = ("full",) if name in OF_LARGE_MAPS else ()
        rows.append(Row(name, "baseline", recipe.changes | change, RECIPE, profiles))
    return (*rows, Row("best", "best", against=RECIPE))


ABLATION = Study("ablation", "What each ingredient is worth", "ablation", grid(), BUDGETS)
