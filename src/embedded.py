"""Make the weights that this repository ships: a finished pretraining in half precision, and its model card.

python -m src.experiment pretrain --profile offline --data DIR
python -m src.experiment export --preset pretrain --profile offline --data DIR
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from src import SetupError
from src import config as configs
from src.experiment import Result, recorded_config
from src.files import sha256, write_atomically
from src.model.build import OWN_METADATA, WEIGHTS_FOLDER

CARD = """\
# {tag}

{millions:.1f} million parameters of timm's `{architecture}`, trained from scratch on Tiny-ImageNet at
{image_size} x {image_size} pixels by this repository, in half precision. They let the `quick` profile and the
tests show transfer learning with a ConvNeXt where no hub can be reached.

- **File:** `{name}`, {megabytes:.1f} MB, SHA-256 `{digest}`.
  The classifier has a row a class, whose WordNet ids are in the file's metadata, so that
  `model.head_init=pretrained_rows` works.
- **Data:** {n_fit:,} training images of Tiny-ImageNet, {n_classes} classes (fingerprint
  `{data_fingerprint}`), which is for non-commercial research under ImageNet's terms.
- **Recipe:** {epochs} epochs from random weights;
  {recipe}.
- **Accuracy:** {accuracy:.2%} of `valid` (n = {n:,}, 95 % interval {wilson_low:.2%} to {wilson_high:.2%}) and
  {holdout_accuracy:.2%} of `holdout` (n = {n_holdout:,}), which chose epoch {best_epoch}; before the weights
  were rounded to half precision. From `results/Pretrain/metrics.json`, beside the curve and every answer.
- **Made by** `python -m src.experiment pretrain {options}`, then the same
  with `export --preset pretrain`: commit `{git_commit}`, {minutes:.0f} minutes on {hardware}.
- **Meant for** demonstration and tests. Weights from ImageNet transfer far better; take those for real work.
"""


def export(result: Result, folder: Path = WEIGHTS_FOLDER) -> tuple[Path, str]:
    """Write the weights in timm's layout and half precision, and their card; path and SHA-256.

    Raises `SetupError` for a run that did not start from random weights, or has more than a plain head.
    """
    setup = result.setup
    architecture, model = setup.config.model.backbone, setup.config.model
    if model.weights != "random" or model.head != "plain" or model.scra:
        raise SetupError(
            f"{setup.config.arm} is no pretraining (weights {model.weights!r}, head {model.head!r}): what it "
            "has beside a backbone and a classifier would be lost. Export one: --preset pretrain."
        )
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in setup.model.state_dict().items()
        if name.startswith("backbone.")
    }
    classifier = setup.model.backbone.pretrained_cfg["classifier"]
    state |= {f"{classifier}.{name}": t for name, t in setup.model.classifier.state_dict().items()}
    halves = {
        name: (t.half() if t.is_floating_point() else t).cpu().contiguous() for name, t in state.items()
    }
    path = folder / f"{architecture}_tinyimagenet{setup.config.model.image_size}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"tag": tag_of(path), "wnids": setup.store.wnids}
    write_atomically(path, lambda partial: save_file(halves, partial, {OWN_METADATA: json.dumps(about)}))
    digest = sha256(path)
    card = card_of(path, digest, result.metrics)
    write_atomically(folder / "README.md", lambda partial: partial.write_text(card, encoding="utf-8"))
    return path, digest


def tag_of(path: Path) -> str:
    """The name of the weights as a backbone: timm's architecture, and where they were trained."""
    return path.stem.replace("_tinyimagenet", ".tinyimagenet")


def options_of(metrics: dict) -> str:
    """The options of the command line, beside `--data`, that give the configuration of `metrics`."""
    plain = configs.flat(recorded_config(configs.preset(metrics["arm"], metrics["profile"])))
    said = {"data.source": metrics["config"]["data"]["source"], "train.seed": metrics["seed"]}
    changed = {
        name: value
        for name, value in configs.flat(metrics["config"]).items()
        if value != (plain | said).get(name, value)
    }
    sets = [f"--set {name}={value}" for name, value in changed.items()]
    return " ".join([f"--profile {metrics['profile']}", "--data DIR", f"--seed {metrics['seed']}", *sets])


def card_of(path: Path, digest: str, metrics: dict) -> str:
    """The model card; every number is from `metrics`, or of the file."""
    config = metrics["config"]
    optim, augment = config["optim"], config["augment"]
    recipe = ", ".join(
        [
            f"AdamW, rate {optim['lr']:g} with a cosine, weight decay {optim['weight_decay']:g}",
            f"batches of {config['train']['batch_size']}",
            f"RandAugment {augment['randaugment_ops']} x {augment['randaugment_magnitude']}",
            f"flips, erasing {augment['erasing']:g}",
            f"label smoothing {optim['label_smoothing']:g}",
            f"moving average of the weights ({config['train']['ema_decay']:g})",
        ]
    )
    return CARD.format(
        **metrics,
        millions=metrics["parameters"] / 1e6,
        tag=tag_of(path),
        architecture=config["model"]["backbone"],
        name=path.name,
        megabytes=path.stat().st_size / 1e6,
        digest=digest,
        recipe=recipe,
        options=options_of(metrics),
        minutes=metrics["seconds"]["total"] / 60,
    )
