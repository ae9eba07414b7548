"""Twenty breeds of dogs: the same steps for each backbone.

    python -m src.experiment dogs20 --profile full --data DIR
    python -m src.experiment ablation --preset dogs20 --profile full --data DIR

In `offline` the images are a stand-in, the six breeds of Tiny-ImageNet, and so are the backbones: the three
whose weights packages carry, the largest for ConvNeXt-Base.
"""

from __future__ import annotations

from src.studies.study import Row, Study

ARM = "dogs20"
HUB_BACKBONES = {
    "MobileNetV2": "mobilenetv2_100.ra_in1k@main",
    "ConvNeXt-Tiny": "convnext_tiny.fb_in1k",
    "ConvNeXt-Base": "convnext_base.fb_in22k_ft_in1k@main",
}
STAND_INS = {
    "EfficientNet-Lite0 (for MobileNetV2)": "tf_efficientnet_lite0.in1k",
    "EfficientNet-Lite1 (for ConvNeXt-Tiny)": "tf_efficientnet_lite1.in1k",
    "EfficientNet-Lite2 (for ConvNeXt-Base)": "tf_efficientnet_lite2.in1k",
}


def rows() -> tuple[Row, ...]:
    """A row a backbone, each compared with the smallest."""
    found = []
    for backbones, profile in ((HUB_BACKBONES, "full"), (STAND_INS, "offline")):
        smallest = next(iter(backbones))
        found += [
            Row(name, ARM, {"model.backbone": tag}, "" if name == smallest else smallest, (profile,))
            for name, tag in backbones.items()
        ]
    return (*found, Row("embedded backbone", ARM, profiles=("quick",)))


DOGS = Study(ARM, "Breeds of dogs", f"studies/{ARM}", rows(), {}, timed=True)
