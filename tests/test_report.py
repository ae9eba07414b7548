"""What an arm's folder holds: every file, numbers that follow from the CSV, figures that can be read."""

import itertools
import json
import logging

import matplotlib
import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from src import figures, report
from src.evaluate import compare, prediction_frame, read_predictions, score, write_predictions
from src.figures.style import GREY
from src.files import write_json

FILES = [
    *("training_curve.png", "8_correct_8_wrong.png", "per_class.png", "confusion_matrix.png"),
    *("confusion_matrix.csv", "validation_predictions.csv", "history.csv", "per_class_accuracy.csv"),
]
ABOUT = {
    "profile": "quick",
    "protocol": "holdout",
    "data": "made up",
    "data_fingerprint": "abc",
    "backbone": "some_net.in1k",
    "weights_sha256": "12",
    "image_size": 96,
    "best_epoch": 1,
    "hardware": "a CPU (2 cores)",
    "seconds": {"total": 12.345678901234, "epochs": [np.float32(0.1)]},
    "gflops": float("nan"),
    "config": {"optim": {"lr": 1e-4}},
}
NAMES = [
    "golden retriever",
    r"$\frac{ $5 bill",
    "a class, with a very long name that no margin can hold",
    "crane",
    "crane",
]


def make_frame(n_classes: int = 10, per_class: int = 6, gain: float = 2.5, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(n_classes), per_class)
    logits_NK = rng.normal(size=(len(labels_N), n_classes))
    logits_NK[np.arange(len(labels_N)), labels_N] += gain
    names = (NAMES + [f"kind of thing {k}" for k in range(n_classes)])[:n_classes]
    ids = [f"valid/{i}" for i in range(len(labels_N))]
    return prediction_frame(logits_NK, labels_N, ids, [f"n{k:08}" for k in range(n_classes)], names)


def make_history(n_epochs: int) -> pd.DataFrame:
    steps = np.arange(1, n_epochs + 1)
    columns = {"fit_loss": 1 / steps, "fit_accuracy": 1 - 0.5 / steps}
    columns |= {"holdout_loss": 1.5 / steps, "holdout_accuracy": 1 - 0.7 / steps}
    return pd.DataFrame({"epoch": steps, **columns, "lr_factor": 1.0})


def images(rows: np.ndarray) -> np.ndarray:
    """Pixels that tell their row: red is the row number."""
    pixels = np.random.default_rng(0).integers(256, size=(len(rows), 16, 16, 3)).astype(np.uint8)
    pixels[..., 0] = np.asarray(rows)[:, None, None] % 256
    return pixels


def write(results, arm="baseline", frame=None, n_epochs=3, **about):
    frame = make_frame() if frame is None else frame
    metadata = {**ABOUT, "arm": arm, "n_classes": 10, **about}
    return report.write_arm(results / arm.capitalize(), arm, frame, make_history(n_epochs), metadata, images)


def texts(figure: Figure) -> list[matplotlib.text.Text]:
    return [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]


def said(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


@pytest.mark.parametrize(("n_classes", "n_epochs"), [(10, 1), (200, 12)])
def test_every_file_is_there_and_opens(tmp_path, n_classes, n_epochs):
    frame = make_frame(n_classes, 4)
    write(tmp_path, frame=frame, n_epochs=n_epochs, n_classes=n_classes)
    folder = tmp_path / "Baseline"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"baseline_{name}" for name in FILES] + ["metrics.json"]
    )
    for path in folder.glob("*.png"):
        assert path.stat().st_size < 1_000_000
        with Image.open(path) as picture:
            picture.load()
            assert picture.width == 1170 and 400 < picture.height < 1800
    counts = pd.read_csv(folder / "baseline_confusion_matrix.csv", index_col=0)
    assert counts.shape == (n_classes, n_classes) and counts.to_numpy().sum() == len(frame)
    assert counts.index[0] == counts.columns[0] == "golden retriever"
    assert counts.to_numpy().trace() == frame["Is_Correct"].sum()
    assert len(pd.read_csv(folder / "baseline_history.csv")) == n_epochs
    table = pd.read_csv(folder / "baseline_per_class_accuracy.csv")
    assert len(table) == n_classes and table["n_correct"].sum() == frame["Is_Correct"].sum()


def test_metrics_follow_from_the_csv(tmp_path):
    returned = write(tmp_path, accuracy=0.99)  # what a caller claims does not count
    folder = tmp_path / "Baseline"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == returned
    recomputed = score(read_predictions(folder / "baseline_validation_predictions.csv"))
    for key, value in recomputed.items():
        if isinstance(value, list):
            assert [c["name"] for c in metrics[key]] == [c["name"] for c in value]
        else:
            assert metrics[key] == pytest.approx(value, rel=1e-7), key
    assert list(metrics)[:4] == ["arm", "n", "n_correct", "accuracy"]
    assert metrics["seconds"] == {"total": 12.345679, "epochs": [0.1]}
    assert metrics["gflops"] is None and metrics["config"] == {"optim": {"lr": 1e-4}}


def test_writing_twice_gives_the_same_bytes(tmp_path):
    before = dict(matplotlib.rcParams)
    for name in ("one", "two"):
        write(tmp_path / name)
    assert dict(matplotlib.rcParams) == before  # and nobody's settings change
    for path in (tmp_path / "one" / "Baseline").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "Baseline" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("n_right", "n_wrong"), [(20, 20), (20, 3), (20, 0), (0, 20), (1, 0)])
def test_right_and_wrong_samples(n_right, n_wrong):
    frame = make_frame(10, 8, gain=1.2)
    frame = pd.concat([frame[frame["Is_Correct"]][:n_right], frame[~frame["Is_Correct"]][:n_wrong]])
    asked = []

    def spy(rows):
        asked.append(np.asarray(rows))
        return images(rows)

    text = said(figures.right_and_wrong(frame, spy, "note", "Baseline"))
    rows = np.concatenate(asked)
    right = frame["Is_Correct"].to_numpy()[rows]
    assert (right.sum(), (~right).sum()) == (min(8, n_right), min(8, n_wrong))
    assert len(set(rows)) == len(rows)
    assert text.count("✓") == min(8, n_right) and text.count("✗") == min(8, n_wrong)
    for _, row in frame.iloc[rows].iterrows():
        assert f"{100 * row['Confidence']:.0f} % sure" in text
        assert figures.clean(row["Ground_Truth_Name"], 24) in text
        assert figures.clean(row["Prediction_Name"], 24) in text


def test_every_image_stands_with_its_own_row():
    frame = make_frame(10, 8, gain=1.2)
    figure = figures.class_samples(frame, images, "note", "Baseline")
    shown = [axes for part in figure.subfigs for axes in part.axes if axes.get_images()]
    assert len(shown) == 10
    for k, axes in enumerate(shown):
        row = int(axes.get_images()[0].get_array()[0, 0, 0])
        assert frame["Ground_Truth"].iloc[row] == k
        assert axes.get_title(loc="center") == figures.clean(frame["Ground_Truth_Name"].iloc[row], 24)
        assert figures.clean(frame["Prediction_Name"].iloc[row], 24) in axes.get_xlabel()
        assert f"{frame['Confidence'].iloc[row]:.0%}".rstrip("%") in axes.get_xlabel()


def test_at_most_sixteen_classes_are_sampled():
    figure = figures.class_samples(make_frame(40, 2), images, "note", "Baseline")
    assert sum(bool(axes.get_images()) for part in figure.subfigs for axes in part.axes) == 16


def test_training_curve_marks_the_best_epoch():
    figure = figures.training_curve(make_history(5), {**ABOUT, "best_epoch": 4}, "note", "Baseline")
    text = said(figure)
    assert "chosen epoch 4: 82.50 %" in text and "chosen epoch 4: 0.3750" in text
    assert "fit (trained on)" in text and "holdout (chosen on)" in text
    assert "Accuracy on held-out and training images" in text
    about = {**ABOUT, "best_epoch": 4, "protocol": "published"}
    published = figures.training_curve(make_history(5), about, "note", "Baseline")
    assert "holdout" not in said(published) and "valid (chosen and reported on)" in said(published)


@pytest.mark.parametrize(
    ("monitor", "protocol", "reason"),
    [
        ("loss", "holdout", "lowest held-out loss"),
        ("accuracy", "holdout", "highest held-out accuracy"),
        ("accuracy", "published", "highest valid accuracy"),
    ],
)
def test_training_curve_says_what_the_epoch_was_chosen_by(monitor, protocol, reason):
    about = {**ABOUT, "best_epoch": 4, "protocol": protocol, "config": {"train": {"monitor": monitor}}}
    figure = figures.training_curve(make_history(5), about, "note", "Baseline")
    assert f"chosen epoch 4 ({reason}): 82.50 %" in said(figure)
    assert f"chosen epoch 4 ({reason}): 0.3750" in said(figure)
    assert_legible(figure, reason)
    assert all(axes.get_legend().handlelength == 3 for axes in figure.axes)  # or the dashes do not show


def test_small_confusion_names_every_class_and_counts_every_cell():
    counts_KK = np.array([[5, 2], [0, 7]])
    figure = figures.confusion_figure(counts_KK, ["cat", "dog"], "note", "Baseline")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cat", "dog"]
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {(0, 0): "5", (0, 1): "2", (1, 1): "7"}


def test_large_confusion_lists_the_strongest_by_name():
    counts_KK = 40 * np.eye(200, dtype=int)
    strongest = [(int(i), int(i) + 100) for i in range(20)]
    for rank, (i, j) in enumerate(strongest):
        counts_KK[i, j] = 10 if rank < 3 else 2
    names = [f"thing {k}" for k in range(200)]
    figure = figures.confusion_figure(counts_KK, names, "note", "Baseline")
    matrix, listing = figure.axes[0], figure.axes[1]
    lines = [t.get_text() for t in listing.texts]
    assert sum("→" in line for line in lines) == 15
    assert {line for line in lines if "10 of 50" in line} == {
        f"thing {i}\n→ thing {i + 100}  10 of 50" for i in range(3)
    }
    assert sorted(int(t.get_text()) for t in matrix.texts) == list(range(1, 16))
    first = next(line for line in lines if "→" in line)
    i, j = (names.index(part) for part in first.replace("→ ", "").split("  ")[0].split("\n"))
    order = figures.similarity_order(counts_KK).tolist()
    number_one = next(t for t in matrix.texts if t.get_text() == "1")
    assert number_one.xy == (order.index(j), order.index(i))


def test_numbers_stay_off_the_axes_of_a_large_confusion():
    """Their white boxes would wipe parts of the lines out."""
    counts_KK = 40 * np.eye(200, dtype=int)
    for i, j in ((0, 1), (1, 0), (0, 199), (199, 0), (198, 199), (199, 198), (0, 100), (199, 100)):
        counts_KK[i, j] = 5
    blocks = [("all", 200)]
    figure = figures.confusion_blocks(counts_KK, [f"thing {k}" for k in range(200)], blocks, "note", "Arm")
    FigureCanvasAgg(figure).draw()
    inside = figure.axes[0].get_window_extent()
    for text in figure.axes[0].texts:
        box = text.get_bbox_patch().get_window_extent()
        assert inside.x0 < box.x0 and box.x1 < inside.x1, text.get_text()
        assert inside.y0 < box.y0 and box.y1 < inside.y1, text.get_text()


def test_order_puts_classes_beside_those_they_are_taken_for():
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(60)
    counts_KK = 40 * np.eye(60, dtype=int)
    for group in shuffled.reshape(20, 3):
        for i in group:
            counts_KK[i, group] += 3
    order = figures.similarity_order(counts_KK)
    assert sorted(order) == list(range(60))
    group_of = {int(k): g for g, group in enumerate(shuffled.reshape(20, 3)) for k in group}
    assert sum(group_of[a] != group_of[b] for a, b in zip(order[:-1], order[1:], strict=True)) == 19


def test_no_confusion_at_all_can_be_drawn():
    text = said(
        figures.confusion_figure(5 * np.eye(50, dtype=int), [f"n {k}" for k in range(50)], "note", "B")
    )
    assert "No confusions" in text


def every_figure() -> dict[str, Figure]:
    frame, large = make_frame(10, 9, gain=1.0), make_frame(200, 5, gain=1.5)
    note = report.footer({**ABOUT, "data": "zh-plus/tiny-imagenet, " + 8 * "a long description of it, "})
    names = [report.class_texts(table) for table in (frame, large)]
    return {
        "curve": figures.training_curve(make_history(12), ABOUT, note, "Improvement"),
        "one epoch": figures.training_curve(make_history(1), ABOUT, note, "Improvement"),
        "samples": figures.right_and_wrong(frame, images, note, "Improvement"),
        "classes": figures.class_samples(large, images, note, "Improvement"),
        "small": figures.confusion_figure(
            report.confusion(frame, 10), list(names[0].values()), note, "Improvement"
        ),
        "large": figures.confusion_figure(
            report.confusion(large, 200), list(names[1].values()), note, "Improvement"
        ),
    }


def assert_legible(figure: Figure, name: str) -> None:
    """Draw, and require every text that is drawn to lie inside the figure and on no other text."""
    drawn = []
    draw = matplotlib.text.Text.draw

    def record(text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            drawn.append(
                (text.get_text(), text.get_rotation(), matplotlib.text.Text.get_window_extent(text, renderer))
            )
        return draw(text, renderer, *args, **kwargs)

    canvas = FigureCanvasAgg(figure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", record)
        canvas.draw()
    width, height = canvas.get_width_height()
    for text, _, box in drawn:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, (name, text, box)
    upright = [(text, box.padded(-1)) for text, rotation, box in drawn if rotation in (0, 90)]
    for (text, box), (other, other_box) in itertools.combinations(upright, 2):
        assert not box.overlaps(other_box), (name, text, other)


def test_no_text_leaves_its_figure_or_covers_another_and_every_footer_is_whole():
    for name, figure in every_figure().items():
        assert_legible(figure, name)
        assert "some_net.in1k · 96 px · data: zh-plus/tiny-imagenet" in said(figure).replace("\n", " "), name
        assert "protocol: holdout · a CPU (2 cores)" in said(figure).replace("\n", " "), name


def leave(results, arm, frame, **about):
    """What `write_comparison` reads of an arm; without the figures it is quick."""
    write_predictions(frame, results / arm.capitalize() / f"{arm}_validation_predictions.csv")
    write_json(
        results / arm.capitalize() / "metrics.json",
        {"arm": arm, **ABOUT, "gflops": 1, "seconds": {}, **about},
    )


def both_arms(results, **about_improvement):
    a, b = make_frame(gain=1.5), make_frame(gain=2.2, seed=1)
    leave(results, "baseline", a)
    leave(results, "improvement", b.sample(frac=1, random_state=0), **about_improvement)
    return a, b


def test_comparison(tmp_path):
    a, b = both_arms(tmp_path)
    result = report.write_comparison(tmp_path)
    assert result == json.loads((tmp_path / "comparison.json").read_text())
    expected = compare(a, b)
    for key in ("difference", "difference_low", "difference_high", "mcnemar_p"):
        assert result[key] == pytest.approx(expected[key], rel=1e-7)
    assert result["improvement"]["accuracy"] == pytest.approx(expected["b"]["accuracy"])
    assert result["same_setup"] is True and result["setup_differences"] == []
    for gain in result["classes_gained"]:
        rows = a["Ground_Truth_Name"] == gain["name"]
        if rows.sum() == 6:  # two classes share one name
            change = (
                b.loc[b["Ground_Truth_Name"] == gain["name"], "Is_Correct"].mean()
                - a.loc[rows, "Is_Correct"].mean()
            )
            assert gain["change"] == pytest.approx(change) and change > 0
    assert all(lost["change"] < 0 for lost in result["classes_lost"])
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width == 1170
    figure = figures.comparison_figure(result, report.footer(ABOUT))
    assert_legible(figure, "comparison")
    text = said(figure)
    assert f"{100 * expected['a']['accuracy']:.2f} %" in text and "McNemar" in text
    assert figures.clean(result["classes_gained"][0]["name"], 28) in text
    assert "also differ" not in text
    changes = [line for line in figure.axes[2].lines if line.get_linestyle() == "-"]
    assert {line.get_color() for line in changes} == {GREY}  # blue and orange are the arms


def test_comparison_says_what_else_differs(tmp_path):
    both_arms(tmp_path, image_size=224, backbone="another.in22k")
    result = report.write_comparison(tmp_path)
    assert result["same_setup"] is False
    assert result["setup_differences"] == ["backbone: some_net.in1k / another.in22k", "image_size: 96 / 224"]
    text = said(figures.comparison_figure(result, "note"))
    assert "also differ in backbone, image_size" in text


def test_comparison_of_equal_arms_can_be_drawn(tmp_path):
    for arm in ("baseline", "improvement"):
        leave(tmp_path, arm, make_frame())
    result = report.write_comparison(tmp_path)
    assert result["difference"] == 0 and result["mcnemar_p"] == 1 and result["classes_gained"] == []


def test_no_comparison_without_both_arms(tmp_path):
    leave(tmp_path, "baseline", make_frame())
    (tmp_path / "comparison.png").write_bytes(b"stale")
    assert report.write_comparison(tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Baseline"]


@pytest.mark.parametrize("fault", ["other data", "broken JSON", "damaged CSV"])
def test_arms_that_do_not_compare_leave_no_stale_comparison(tmp_path, caplog, fault):
    both_arms(tmp_path)
    assert report.write_comparison(tmp_path)
    if fault == "other data":
        leave(tmp_path, "improvement", make_frame(8))
    elif fault == "broken JSON":
        (tmp_path / "Improvement" / "metrics.json").write_text("{")
    else:
        (tmp_path / "Improvement" / "improvement_validation_predictions.csv").write_text("")
    with caplog.at_level(logging.WARNING):
        assert report.write_comparison(tmp_path) is None
    assert {"other data": "48 rows", "broken JSON": "metrics.json", "damaged CSV": "predictions.csv"}[
        fault
    ] in caplog.text
    assert not list(tmp_path.glob("comparison.*"))
