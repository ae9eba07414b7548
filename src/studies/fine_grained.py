"""Fine-grained classes: augmentation, L2-SP, dropout and SCRA, as the study's Table 1 combines them.

    python -m src.experiment fine_grained --profile full --data DIR
    python -m src.experiment ablation --preset fine_grained --profile full --data DIR

`DIR` holds CUB-200-2011, CUB and FGVC-Aircraft, or FoodX-251. In `offline` the images are a stand-in, classes
of Tiny-ImageNet that look alike.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from src import SetupError
from src.config import Config
from src.model.build import cost
from src.studies.study import Row, Study

ARM = "fine_grained"
BASELINE = "baseline"
FLOPS_ALLOWED = 1.05  # of the baseline's, the rule of the study
PLAIN = {
    **{"augment.flip": 0.0, "augment.rotation": 0.0, "augment.jitter": 0.0, "augment.hue": 0.0},
    **{"model.dropout": 0.0, "model.scra": False},
}
INGREDIENTS = {
    "augmentation": {
        **{"augment.flip": 0.25, "augment.rotation": 15.0, "augment.jitter": 0.25, "augment.hue": 0.05}
    },
    "L2-SP": {"optim.l2_sp": 0.02},  # the study's λ ‖w − w₀‖² with λ = 0.01, here λ/2
    "dropout": {"model.dropout": 0.45},
    "SCRA": {"model.scra": True},
}
TABLE_1 = (
    ("augmentation",),
    ("augmentation", "L2-SP"),
    ("augmentation", "L2-SP", "dropout"),
    ("augmentation", "L2-SP", "dropout", "SCRA"),
    ("augmentation", "dropout", "SCRA"),
)


def rows() -> tuple[Row, ...]:
    """Table 1, each row compared with its first."""
    combined = []
    for names in TABLE_1:
        changes = dict(PLAIN)
        for name in names:
            changes |= INGREDIENTS[name]
        combined.append(Row(" + ".join((BASELINE, *names)), ARM, changes, BASELINE))
    return (Row(BASELINE, ARM, dict(PLAIN)), *combined)


BUDGETS = {
    "quick": {"train.epochs": 2},
    "offline": {"model.image_size": 64, "data.fit_per_class": 100, "train.epochs": 10},
}
FINE_GRAINED = Study(ARM, "Fine-grained classes", f"studies/{ARM}", rows(), BUDGETS)


# Of the study's Table 1: millions of parameters and GFLOPs, which are twice the multiply-adds, by SCRA.
REPORTED_COST = {False: (196.660, 68.72), True: (196.881, 68.80)}
CLASSES = {"CUB": 200, "CUB + Aircraft": 300, "FoodX-251": 251}


def costs(config: Config) -> pd.DataFrame:
    """Parameters and GFLOPs of the rows as described, counted, beside those reported; a line a data set.

    GFLOPs are counted as the study does, two for each multiply-add. Raises `SetupError` where SCRA breaks the
    study's rule: at most 5 % more GFLOPs than the baseline.
    """
    lines = []
    for data, n_classes in CLASSES.items():
        counted = {scra: cost(replace(config.model, scra=scra), n_classes) for scra in (False, True)}
        require_few_flops(counted[True][1], counted[False][1])
        for scra, (parameters, gmacs) in counted.items():
            reported_parameters, reported_gflops = REPORTED_COST[scra]
            lines.append(
                {
                    "row": "with SCRA" if scra else "without SCRA",
                    "data": data,
                    "classes": n_classes,
                    "parameters_m": round(parameters / 1e6, 3),
                    "reported_parameters_m": reported_parameters,
                    "gflops": round(2 * gmacs, 2),
                    "reported_gflops": reported_gflops,
                }
            )
    return pd.DataFrame(lines)


def require_few_flops(gflops: float, baseline_gflops: float) -> None:
    """Raises `SetupError` where a row computes over 5 % more than the baseline."""
    if gflops > FLOPS_ALLOWED * baseline_gflops:
        raise SetupError(
            f"{gflops:.2f} GFLOPs are {gflops / baseline_gflops - 1:.1%} more than the baseline's "
            f"{baseline_gflops:.2f}; at most {FLOPS_ALLOWED - 1:.0%} more are allowed."
        )
