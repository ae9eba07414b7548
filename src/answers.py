"""What a finished run says of images without labels: a folder of them, or the data set's own test images.

    python -m src.experiment predict --preset improvement --profile offline --data DIR --images FOLDER
    python -m src.experiment predict --preset improvement --profile offline --data DIR
    python -m src.experiment improvement --data DIR --images FOLDER     which trains first, where it has to

The images are decoded into a store like those of training and go through the model as `valid` does, so that
equal pixels get equal answers.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from scipy.special import softmax

from src import SetupError
from src.after import Predictor, averaged_views
from src.config import Config, with_fields
from src.data.batches import Batches
from src.data.sources import Example, Source, open_source
from src.data.sources.base import digest_of, name_of
from src.data.sources.trees import (
    IMAGE_SUFFIXES,
    FolderTree,
    is_hidden,
    is_image,
    require_utf8,
    version,
)
from src.data.store import Store, open_store
from src.experiment import Setup, finished_run, run
from src.files import read_json, write_csv
from src.folders import Paths, require_writable, shown

SUBMISSION = "submission.csv"
# Columns of the three likeliest classes: id, name, confidence.
PLACES = (
    ("prediction", "name", "confidence"),
    ("second", "second_name", "second_confidence"),
    ("third", "third_name", "third_confidence"),
)
AT_ONCE = 2**14  # images whose logits are in memory together


class UnlabelledFolder(FolderTree):
    """The images below a folder, however deep, as a source without classes; all are `test`.

    Hidden files, files without an image's suffix and what is behind linked folders are passed over.
    Raises `SetupError` for a folder that cannot be listed or holds no images, for a file name that is not
    UTF-8, and for an image that is a pipe or a device.
    """

    wnids = class_names = ()

    def __init__(self, root: Path):
        self.root = Path(root)
        self.name = name_of(self.root)
        if not self.root.is_dir():
            raise SetupError(f"{root} is not a folder. Name one that holds images with --images.")
        self.files = {name: version(self.root / name) for name in sorted(self._names())}
        if not self.files:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise SetupError(f"{root} holds no images ({suffixes}). Name a folder that does with --images.")

    def _names(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self.root, onerror=_refuse):
            folders[:] = [name for name in folders if not is_hidden(name)]
            for name in names:
                if is_image(name) and not is_hidden(name):
                    relative = Path(folder, name).relative_to(self.root).as_posix()
                    require_utf8(self.root, relative)
                    yield relative

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_of("unlabelled", *self.files.items())

    def examples(self) -> list[Example]:
        return [Example(name, -1, "test", functools.partial(self.read, name)) for name in self.files]


def _refuse(error: OSError) -> None:
    raise SetupError(f"{error.filename} cannot be listed ({error.strerror}). Make it readable.")


def write_answers(config: Config, paths: Paths, images: str, out: Path) -> list[str]:
    """Answer the images below the folder `images`, or the data set's test images where it is "", into `out`.

    Nothing is trained: the run must be finished. The data set's test images get a `submission.csv` beside
    `out`, too. Returns lines that say what was done and which images `config.data.skip_bad` left out.
    Raises `SetupError` for a run that is not finished, images that cannot be read, data without test images
    and a place that cannot be written to.
    """
    require_answerable(images, out)
    setup = run(as_it_ran(config, finished_run(config, paths)), paths).setup
    return answer(setup, images, out, config.data.skip_bad)


def require_answerable(images: str, out: Path) -> None:
    """Raise `SetupError` where `out` cannot be written to, or `images` names no folder that holds any."""
    if (out.exists() and not out.is_file()) or (not images and out.name == SUBMISSION):
        raise SetupError(f"--out {out} is no file, or the submission's place. Name another file.")
    require_writable(out.parent)
    if images:
        UnlabelledFolder(Path(images).expanduser())


def answer(setup: Setup, images: str, out: Path, skip_bad: bool) -> list[str]:
    """`write_answers` of the finished run in `setup`, whose model holds its weights."""
    data, cache = setup.config.data, setup.paths.cache
    folder = UnlabelledFolder(Path(images).expanduser()) if images else None
    source: Source = folder or open_source(data, cache)
    store = setup.store
    if folder:
        store = open_store(folder, cache, data.stored_size, resize=data.resize, skip_bad=skip_bad)
    bad = left_out(store, source)
    table = answered(setup, store, list(bad))
    write_csv(table, out)
    said = [f"{len(table) - len(bad):,} images answered by {setup.config.run_name}: see {shown(out)}"]
    if not images:
        path = out.with_name(SUBMISSION)
        write_submission(path, table["image"].tolist(), table["prediction"].tolist())
        said.append(f"as a submission: {shown(path)}")
    return said + [f"left out: {image_id}: {reason}" for image_id, reason in bad.items()]


def as_it_ran(config: Config, run_folder: Path) -> Config:
    """`config` with the run's own `data.skip_bad`: what is asked for now is about the images to answer."""
    path = run_folder / "run.json"
    recorded = read_json(path)["config"]["data"] if path.exists() else {}
    return with_fields(config, {"data.skip_bad": recorded.get("skip_bad", config.data.skip_bad)})


def left_out(store: Store, source: Source) -> dict[str, str]:
    """Test images of `source` that the store lacks, by id, and why."""
    bad = {item["image_id"]: item["reason"] for item in store.manifest["bad_files"]}
    if not bad:
        return {}
    return {e.image_id: bad[e.image_id] for e in source.examples() if e.split == "test" and e.image_id in bad}


def answered(setup: Setup, store: Store, left_out: Sequence[str] = ()) -> pd.DataFrame:
    """`answer_table` of the store's test images by a finished run, sorted by image.

    `setup.model` holds the run's weights; images in `left_out` get a row without an answer. Raises
    `SetupError` for a store without test images.
    """
    rows_N = np.flatnonzero(store.official_split_N == "test")
    if not len(rows_N):
        raise SetupError(
            f"{store.manifest['source']} has no test images of its own. Name a folder with --images."
        )
    classes = setup.store.wnids, setup.store.class_names
    tables = [
        answer_table(store.image_ids_N[part].tolist(), logits_of(setup, store, part), *classes)
        for part in np.array_split(rows_N, -(-len(rows_N) // AT_ONCE))
    ]
    if left_out:
        tables.append(pd.DataFrame({"image": list(left_out)}))
    table = pd.concat(tables, ignore_index=True)
    texts = [name for place in PLACES for name in place[:2]]
    return table.fillna(dict.fromkeys(texts, "")).sort_values("image", kind="stable", ignore_index=True)


def logits_of(setup: Setup, store: Store, rows_M: np.ndarray) -> np.ndarray:
    """Logits (M,K) of rows of `store`, as the finished run in `setup` says them of `valid`."""
    device, preprocess = setup.device, setup.built.preprocess
    rows = store.images, store.labels_N, rows_M
    batches = Batches(*rows, device.eval_batch, device.torch_device, preprocess)
    return finished_predictor(setup).logits(batches.at_size(setup.config.model.predicts_at), "test")


def finished_predictor(setup: Setup) -> Predictor:
    """How the finished run in `setup` predicts: by its weights, and the views and temperature it kept."""
    facts = read_json(setup.run_folder / "facts.json")
    model, kind = setup.model.to(setup.device.torch_device).eval(), setup.config.after.tta
    kept = {step["step"] for step in facts["after"] if step["kept"]}
    function = averaged_views(model, kind) if kind in kept else model
    return Predictor(function, setup.device, facts["temperature"])


def answer_table(
    image_ids: Sequence[str], logits_NK: np.ndarray, wnids: Sequence[str], class_names: Sequence[str]
) -> pd.DataFrame:
    """A row an image: its id, then id, name and confidence (softmax) of the three likeliest classes.

    The first of equal logits wins, as in `prediction_frame`; confidences are rounded to 6 decimals. With two
    classes the third is empty. Raises `SetupError` for logits that are not finite.
    """
    logits_NK = np.asarray(logits_NK, np.float64)
    if (bad := np.flatnonzero(~np.isfinite(logits_NK).all(axis=1))).size:
        raise SetupError(
            f"the model's output is NaN or infinite for {bad.size} of {len(logits_NK)} images, first "
            f"{image_ids[bad[0]]!r}. Train again with a lower learning rate, or without mixed precision."
        )
    order_NK = np.argsort(-logits_NK, axis=1, kind="stable")
    probabilities_NK = softmax(logits_NK, axis=1)
    wnids, class_names = np.asarray(wnids, object), np.asarray(class_names, object)
    columns: dict[str, Sequence] = {"image": list(image_ids)}
    for place, (wnid, name, confidence) in enumerate(PLACES):
        if place == len(wnids):
            columns |= {wnid: "", name: "", confidence: np.nan}
            break
        said_N = order_NK[:, place]
        columns |= {wnid: wnids[said_N], name: class_names[said_N]}
        columns[confidence] = probabilities_NK[np.arange(len(said_N)), said_N].round(6)
    return pd.DataFrame(columns)


def write_submission(path: Path, image_ids: Sequence[str], classes: Sequence[str]) -> None:
    """A CSV `image_id,class` as Kaggle's competitions take it: file names without folders, sorted; class ids.

    Raises `SetupError` unless every image is answered, and once: ids and classes of unequal number, an empty
    class, and a file name that occurs in two folders.
    """
    if len(image_ids) != len(classes):
        raise SetupError(f"{path}: {len(image_ids)} images have {len(classes)} answers.")
    names = [PurePosixPath(image_id).name for image_id in image_ids]
    if empty := [name for name, answer in zip(names, classes, strict=True) if not answer]:
        raise SetupError(
            f"{path} is not written: {len(empty)} test images have no answer, first {empty[0]!r}. Mend them."
        )
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise SetupError(
            f"{path} is not written: {len(twice)} file names occur more than once among the test images, "
            f"first {twice[0]!r}. A submission names images without their folder: rename them."
        )
    table = pd.DataFrame({"image_id": names, "class": list(classes)}).sort_values("image_id")
    write_csv(table, path, inert=False)  # a challenge wants names to the letter
