"""Fine-tuning ConvNeXt on small image sets: data path, recipe, head, evaluation and report.

Shape suffixes, the same in every module:
B batch, C channels, H height, W width, T tokens (= H·W), K classes, N examples, D features.
`images_BCHW`, `tokens_BTC`, `logits_BK`, `labels_N`, `confusion_KK` (row = truth).

Splits are never synonyms: `fit` is trained on, `holdout` is chosen on, `valid` is reported on,
`test` is unlabelled.
"""


class SetupError(Exception):
    """Something the user can mend: the message names the thing, the value and the remedy."""


class NotNow(SetupError):
    """What was asked for is right: a full disk, another process at work or a lost drive is in its way."""
