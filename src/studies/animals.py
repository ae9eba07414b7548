"""Forty animals: how classes are balanced, what augmentation adds, and which backbone.

    python -m src.experiment animals40 --profile full --data DIR
    python -m src.experiment ablation --preset animals40 --profile full --data DIR

In `offline` the images are a stand-in, cut from Tiny-ImageNet.
"""

from __future__ import annotations

from src.studies.study import Row, Study

ARM = "animals40"
RECIPE, ALL_TRAINED = "recipe as written", "all layers trained"
CHANGES = {
    "no balancing": {"data.sampling": "shuffle"},
    "class weights for sampling": {"data.sampling": "shuffle", "optim.class_weights": True},
    # As many as the largest class has at most; an image that comes again is augmented anew.
    "as many images of every class": {"data.draws_per_class": 250},
    "mixup": {"augment.mixup": 0.2},
    "CutMix": {"augment.cutmix": 1.0},
    "erasing": {"augment.erasing": 0.25},
    "without augmentation": {"augment.flip": 0.0, "augment.rotation": 0.0, "augment.jitter": 0.0},
    "without label smoothing": {"optim.label_smoothing": 0.0},
    "without dropout": {"model.dropout": 0.0},
    ALL_TRAINED: {"model.trainable": "all", "optim.lr": 1e-4},
}
# The backbones that the study compared, and those whose weights packages carry.
HUB_BACKBONES = {
    "ResNet-50": "resnet50.tv_in1k",
    "ResNet-101": "resnet101.tv_in1k",
    "Inception-V3": "inception_v3.tv_in1k",
    "EfficientNet-B0": "efficientnet_b0.ra_in1k",
    "ConvNeXt-Small": "convnext_small.fb_in1k",
    "ConvNeXt-Base": "convnext_base.fb_in1k",
}
PACKAGE_BACKBONES = {
    "EfficientNet-Lite1": "tf_efficientnet_lite1.in1k",
    "EfficientNet-Lite2": "tf_efficientnet_lite2.in1k",
}


def rows() -> tuple[Row, ...]:
    """The recipe, then what differs from it by one thing, then other backbones."""
    changed = [Row(name, ARM, change, RECIPE) for name, change in CHANGES.items()]
    hub = [
        Row(name, ARM, {"model.backbone": f"{tag}@main"}, RECIPE, ("full",))
        for name, tag in HUB_BACKBONES.items()
    ]
    # Its layers are no blocks, so all of it is trained, and it is compared with what is trained so.
    of_vgg = CHANGES[ALL_TRAINED] | {"model.backbone": "vgg16.tv_in1k@main"}
    vgg = Row("VGG-16", ARM, of_vgg, ALL_TRAINED, ("full",))
    package = [
        Row(name, ARM, {"model.backbone": tag}, RECIPE, ("offline",))
        for name, tag in PACKAGE_BACKBONES.items()
    ]
    return (Row(RECIPE, ARM), *changed, vgg, *hub, *package)


BUDGETS = {
    "quick": {"train.epochs": 2},
    "offline": {"model.image_size": 64, "train.epochs": 5},  # of 20: 39 runs are an evening of two CPU cores
}
ANIMALS = Study(ARM, "Forty animals", f"studies/{ARM}", rows(), BUDGETS)
