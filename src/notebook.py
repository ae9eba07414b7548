"""What the notebooks show, so that they can stay thin: each function returns something to display."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import Image, Markdown
from matplotlib.figure import Figure
from PIL import Image as Pillow
from torch import nn

from src import SetupError, audit, ensemble, folds, search
from src.answers import write_answers
from src.attributions import METHODS
from src.config import Config
from src.data.augment import augment
from src.evaluate import per_class
from src.experiment import Result, Setup, class_counts_of, configure, finished_run, run
from src.explain import shown_together, write_explanations
from src.figures.attributions import drop_findings
from src.files import read_json
from src.strangers import in_words, write_strangers, zero_shot_in_words
from src.studies import STUDIES, reported

WIDTH = 900  # pixels: as wide as a notebook's column, and an executed copy stays well below 1 MB


def data_summary(setup: Setup) -> Markdown:
    """Which data, how many images each split has, the first class names."""
    store, splits = setup.store, setup.splits
    names = ", ".join(store.class_names[:8])
    more = len(store.class_names) - 8
    counts = " | ".join(f"{len(rows):,}" for rows in (splits.fit_N, splits.holdout_N, splits.valid_N))
    if splits.protocol == "published":
        note = "Protocol `published`: `valid` also chooses the epoch, so it is an optimistic number."
    else:
        note = "Protocol `holdout`: every choice is made on images held out of train; `valid` is scored once."
    bad = [item["image_id"] for item in store.manifest["bad_files"]]
    left_out = f" Left out as unreadable: {len(bad):,} ({', '.join(bad[:5])})." if bad else ""
    return Markdown(
        f"**{store.manifest['source']}**, {len(store.class_names)} classes, stored at {store.size} × "
        f"{store.size} pixels: {names}{f' and {more} more' if more > 0 else ''}.\n\n"
        "| fit: trained on | holdout: chosen on | valid: reported on |\n| ---: | ---: | ---: |\n"
        f"| {counts} |\n\n{note}{left_out}"
    )


def batch_figure(setup: Setup, n_images: int = 8) -> Image:
    """Training images as stored, and below them as the network gets them; twice where chance has a part."""
    store, preprocess, augmentation = setup.store, setup.built.preprocess, setup.config.augment
    rows = np.sort(np.random.default_rng(0).choice(setup.splits.fit_N, n_images, replace=False))
    stored_BCHW = torch.from_numpy(store.images[rows])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    lines = [(f"stored: {store.size} px", stored_BCHW / 255)]
    for draw in range(1 if augmentation.is_identity else 2):
        generator = torch.Generator().manual_seed(draw)
        seen_BCHW = preprocess(augment(stored_BCHW, augmentation, generator, preprocess.fill)) * std + mean
        lines.append((f"seen: {preprocess.size} px", seen_BCHW.clamp(0, 1)))
    return image_grid(lines, [store.class_names[label] for label in store.labels_N[rows]])


def image_grid(lines: list[tuple[str, torch.Tensor]], names: list[str]) -> Image:
    """Lines of images with their titles, each a float tensor (B,3,H,W) in [0, 1]; `names` stand above."""
    figure = Figure(figsize=(1.5 * len(names), 1.75 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), len(names), squeeze=False)
    for line, (title, images_BCHW) in zip(axes, lines, strict=True):
        line[0].set_ylabel(title, fontsize=9)
        for axis, image_CHW in zip(line, images_BCHW, strict=True):
            axis.imshow(image_CHW.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name if len(name) < 18 else f"{name[:16]}…", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=WIDTH / figure.get_figwidth())
    return small_image(buffer)


def parts(model: nn.Module) -> pd.DataFrame:
    """The model part by part: kind, parameters, how many of them training changes, train or eval mode."""
    rows = []
    for name, module in _leaves(model):
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
        total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
        rows.append({"part": name, "kind": type(module).__name__, "parameters": total, "trainable": trained})
    table = pd.DataFrame(rows).query("parameters > 0").set_index("part")
    table.loc["total"] = ["", table["parameters"].sum(), table["trainable"].sum()]
    return table


def images_per_class(setup: Setup) -> Image:
    """A bar a class, from the largest: how many images it has."""
    buffer = io.BytesIO()
    class_counts_of(setup).savefig(buffer, dpi=120)
    return small_image(buffer)


def strangers(result: Result) -> list[Markdown | Image]:
    """What test images of unknown classes cost; where they have no labels, a submission."""
    setup = result.setup
    try:
        folder = write_strangers(result)
    except SetupError:
        lines = write_answers(setup.config, setup.paths, "", result.folder / "answers.csv")
        return [Markdown("\n\n".join(lines))]
    return [Markdown(in_words(read_json(folder / "unknown.json"))), small_image(folder / "unknown.png")]


def study(result: Result) -> Markdown:
    """The rows of the run's study in words, or the command that runs them."""
    config = result.setup.config
    path = result.folder / "summary.md"
    if not path.exists():
        return Markdown(f"*Not run yet:* `python -m src.experiment ablation {_where(config)}`")
    return Markdown(path.read_text(encoding="utf-8").partition("\n")[2])


def _where(config: Config) -> str:
    """Options of a command on the run's preset, profile and data."""
    data = "" if config.profile == "quick" else " --data DIR"
    return f"--preset {config.arm} --profile {config.profile}{data}"


def beside_reported(result: Result) -> Markdown:
    """What the study reports beside what was measured here, as a table, which is written as CSV, too."""
    study = STUDIES[result.setup.config.arm]
    return Markdown(reported.markdown(reported.write_beside_reported(study, result.setup.paths.results)))


def picture(result: Result, name: str) -> Image:
    """The arm's figure `name`, e.g. `training_curve`, made small."""
    return small_image(result.folder / f"{result.setup.config.arm}_{name}.png")


def small_image(file: Path | io.BytesIO) -> Image:
    """An image for display, at most `WIDTH` wide, as PNG with a palette or JPEG: whichever is smaller."""
    with Pillow.open(file) as opened:
        image = opened.convert("RGB")
    image.thumbnail((WIDTH, 4 * WIDTH))
    encoded = {}
    for kind, version, options in (
        ("png", image.quantize(128), {"optimize": True}),
        ("jpeg", image, {"quality": 60, "optimize": True}),
    ):
        buffer = io.BytesIO()
        version.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return Image(data=encoded[kind], format=kind, width=image.width)


def class_table(result: Result, n_rows: int = 5) -> pd.DataFrame:
    """The best and the worst classes on `valid`, each with the class that it is most often taken for."""
    columns = {"accuracy": "accuracy", "n": "images", "most_confused_with": "most often taken for"}
    table = per_class(result.predictions)[["name", *columns]].rename(columns=columns)
    table = table.sort_values("accuracy", ascending=False, kind="stable")
    chosen = table if len(table) <= 2 * n_rows else pd.concat([table.head(n_rows), table.tail(n_rows)])
    return chosen.assign(accuracy=chosen["accuracy"].map("{:.1%}".format)).set_index("name")


def conclusion(result: Result) -> Markdown:
    """What the run measured, in sentences; every number is read from its metrics.json and history."""
    m = read_json(result.folder / "metrics.json")
    best = result.history.set_index("epoch").loc[m["best_epoch"]]
    chosen_on = "holdout" if m["protocol"] == "holdout" else "valid"
    lines = [
        f"`{m['backbone']}` at {m['image_size']} px classifies **{m['accuracy']:.2%}** of the {m['n']:,} "
        f"`valid` images of {m['data']} correctly (95 % interval {m['wilson_low']:.2%} to "
        f"{m['wilson_high']:.2%}; guessing would give {1 / m['n_classes']:.1%}). The right class is among "
        f"the first five for {m['top5_accuracy']:.2%}.",
        f"Training changed {m['trainable_parameters']:,} of {m['parameters']:,} parameters and took "
        f"{m['seconds']['total'] / 60:.1f} minutes on {m['hardware']}. Epoch {m['best_epoch']} of "
        f"{m['epochs']} was chosen on `{chosen_on}`, with {best['holdout_accuracy']:.2%} right there and "
        f"{best['fit_accuracy']:.2%} of the training images.",
    ]
    if m["profile"] == "quick":
        seen = "8 × 8 pixel digits" if m["data"] == "digits" else "generated pictures"
        lines.append(
            f"**This was the `quick` profile**: {seen}, and a ConvNeXt-Atto pretrained on Tiny-ImageNet. It "
            "shows transfer to pictures of another kind, and that every step works; it says nothing about "
            "ConvNeXt-Tiny, nor about photographs."
        )
    return Markdown("\n\n".join(lines))


def where_it_looks(result: Result) -> list[Markdown | Image]:
    """The run's maps, or both main arms' on the same images; a hint where the other has not run."""
    setup, config = result.setup, result.setup.config
    overrides = {"data.protocol": config.data.protocol, "train.seed": config.train.seed}
    arms = shown_together(config.arm)
    others = {a: configure(a, config.profile, config.data.path, overrides) for a in arms if a != config.arm}
    try:
        for other in others.values():
            finished_run(other, setup.paths)
    except SetupError as error:
        return [Markdown(f"*This needs both arms:* {error}")]
    folder = write_explanations([run(others[a], setup.paths) if a in others else result for a in arms])
    names = ("where_it_looks.png", "attention_over_training.png")
    return [small_image(folder / name) for name in names if (folder / name).exists()]


@dataclass(frozen=True)
class Further:
    """What a command makes of finished runs: its JSON below the arm's folder, its words and its picture."""

    title: str
    command: str
    file: str
    words: Callable[[dict], str]
    picture: str = ""


FURTHER = (
    Further("CLIP, zero-shot", "zero_shot", "zero_shot/zero_shot.json", zero_shot_in_words),
    Further("k-fold cross-validation", "cross_validate", "folds.json", folds.in_words),
    Further("Ensemble of seeds", "ensemble", "ensemble/ensemble.json", ensemble.in_words),
    Further("Search", "search", "search.json", search.in_words, "search.png"),
    Further(
        "LIME and SHAP",
        "attributions",
        "explain/attributions.json",
        lambda found: drop_findings(found, METHODS),
        "explain/attributions.png",
    ),
    Further("Near-duplicates", "audit", "data/audit.json", audit.copies_in_words, "data/near_duplicates.png"),
)


def further(result: Result) -> list[Markdown | Image]:
    """What there is of a study's `FURTHER`, in words and pictures; of the others the commands.

    CLIP's answers are scored, and stand there where the test images have labels.
    """
    setup, shown = result.setup, []
    for part in FURTHER if setup.store.true_labels_N is not None else FURTHER[1:]:
        path = result.folder / part.file
        told = f"not run: `python -m src.experiment {part.command} {_where(setup.config)}`"
        if path.exists():
            told = part.words(read_json(path))
        shown.append(Markdown(f"**{part.title}:** {told}"))
        if path.exists() and part.picture and (result.folder / part.picture).exists():
            shown.append(small_image(result.folder / part.picture))
    return shown


def comparison(result: Result) -> list[Markdown | Image]:
    """The two arms against each other, as sentences and a picture; a hint where the other has not run."""
    folder = result.folder.parent
    if not (folder / "comparison.json").exists():
        return [Markdown("*The other arm has not run here yet: run its notebook, then this cell's again.*")]
    c = read_json(folder / "comparison.json")
    text = (
        f"Improvement minus baseline: **{100 * c['difference']:+.2f} points** (95 % interval "
        f"{100 * c['difference_low']:+.2f} to {100 * c['difference_high']:+.2f}). Of {c['n']:,} images the "
        f"baseline alone got {c['only_a_correct']:,} right, the improvement alone {c['only_b_correct']:,}; "
        f"McNemar's test: p = {c['mcnemar_p']:.2g}."
    )
    if not c["same_setup"]:
        text += f"\n\n**The arms do not share one setup:** {'; '.join(c['setup_differences'])}."
    return [Markdown(text), small_image(folder / "comparison.png")]


def _leaves(model: nn.Module, depth: int = 2, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Named children; containers (a backbone, its stages) are opened down to `depth` further levels."""
    found = []
    for name, module in model.named_children():
        opened = depth and (isinstance(module, nn.Sequential) or name == "backbone")
        found += _leaves(module, depth - 1, f"{prefix}{name}.") if opened else [(prefix + name, module)]
    return found
