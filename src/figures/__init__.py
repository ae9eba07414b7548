"""Figures: each function returns a `matplotlib.figure.Figure`; nothing is saved.

Classes appear by name, and every figure carries the footer (`note`) that says which run it shows.
"""

from src.figures.arm import N_SAMPLES, class_counts, class_samples, right_and_wrong, training_curve
from src.figures.attributions import attribution_figure
from src.figures.comparison import comparison_figure
from src.figures.confusion import confusion_blocks, confusion_figure, similarity_order
from src.figures.errors import (
    changes_figure,
    class_accuracy_figure,
    confidence_figure,
    confused_pairs_figure,
    reliability_figure,
    superclass_figure,
    suspects_figure,
)
from src.figures.search import search_figure
from src.figures.study import lr_figure, study_figure, transfer_figure
from src.figures.style import Images, clean
from src.figures.unknown import unknown_figure

__all__ = [
    "N_SAMPLES",
    "Images",
    "attribution_figure",
    "changes_figure",
    "class_accuracy_figure",
    "class_counts",
    "class_samples",
    "clean",
    "comparison_figure",
    "confidence_figure",
    "confused_pairs_figure",
    "confusion_blocks",
    "confusion_figure",
    "lr_figure",
    "reliability_figure",
    "right_and_wrong",
    "search_figure",
    "similarity_order",
    "study_figure",
    "superclass_figure",
    "suspects_figure",
    "training_curve",
    "transfer_figure",
    "unknown_figure",
]
