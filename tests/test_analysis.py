"""What the arms get wrong: tables against other ways to count, and every file that is written."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from scipy import stats
from sklearn.metrics import auc, roc_curve
from test_report import ABOUT, assert_legible, images, leave, make_frame, said

from src import SetupError, analysis, figures, report
from src.evaluate import compare, confusion, prediction_frame, score
from src.figures.style import BLUE, ORANGE
from src.files import sha256

# fmt: off
FILES = [
    "analysis.json", "changes.png", "class_accuracy.png", "class_changes.csv", "confidence.png",
    "confused_pairs.csv", "confused_pairs.png", "gallery.csv", "gallery.webp", "label_suspects.csv",
    "label_suspects.png", "pair_changes.csv", "reliability.csv", "reliability.png", "risk_coverage.csv",
]
OF_SUPERCLASSES = ["confusion_blocks.png", "superclasses.csv", "superclasses.png"]
# fmt: on


def table_of(truth: list[int], said: list[int], sure: list[float] | None = None) -> pd.DataFrame:
    """A prediction table of four classes, written out by hand."""
    n, logits_NK = len(truth), np.zeros((len(truth), 4))
    logits_NK[np.arange(n), said] = 1
    wnids, names = [f"n{k}" for k in range(4)], ["cat", "dog", "car", "bus"]
    frame = prediction_frame(logits_NK, np.array(truth), [f"valid/{i}" for i in range(n)], wnids, names)
    return frame if sure is None else frame.assign(Confidence=sure)


def two_arms(n_classes: int = 10, per_class: int = 12) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of every other image both see the same, so that they also make the same mistakes."""
    a, alike, other = (
        make_frame(n_classes, per_class, g, seed) for g, seed in ((1.5, 0), (1.7, 0), (2.2, 1))
    )
    return a, pd.concat([alike[::2], other[1::2]]).sort_index()


def groups_of(n_classes: int, n_groups: int) -> dict[str, str]:
    return {f"n{k:08}": f"group {k % n_groups}" for k in range(n_classes)}


def arms_with(folder, a: pd.DataFrame, b: pd.DataFrame, **about) -> None:
    leave(folder, "baseline", a, **about)
    leave(folder, "improvement", b, **about)


def test_confused_pairs_by_hand():
    frame = table_of([0, 0, 0, 1, 1, 2, 3, 3], [1, 1, 0, 0, 3, 2, 3, 1], [0.5, 0.9, 1, 0.7, 0.6, 1, 1, 0.8])
    table = analysis.confused_pairs(frame)
    columns = ["first_name", "second_name", "first_as_second", "second_as_first", "n", "n_first", "n_second"]
    assert table[columns].to_numpy().tolist() == [
        ["cat", "dog", 2, 1, 3, 3, 2],
        ["dog", "bus", 1, 1, 2, 2, 2],
    ]
    assert table["share"].tolist() == [3 / 5, 2 / 5]
    assert table["first_rows"].tolist() == [[1, 0], [4]] and table["second_rows"].tolist() == [[3], [7]]


def test_confused_pairs_against_the_confusion_matrix():
    frame = make_frame(12, 15, gain=1.0)
    table, counts_KK = analysis.confused_pairs(frame), confusion(frame, 12)
    for row in table.itertuples():
        assert row.first < row.second
        assert row.first_as_second == counts_KK[row.first, row.second]
        assert row.second_as_first == counts_KK[row.second, row.first]
        assert all(frame["Prediction"].iloc[row.first_rows] == row.second) and len(row.first_rows) <= 3
    assert table["n"].sum() == counts_KK.sum() - np.trace(counts_KK) and table["n"].is_monotonic_decreasing
    assert table["share"].sum() == pytest.approx(1)


def test_changes_by_class_against_binomial_tests_and_holm_by_hand():
    a, b = make_frame(6, 40, gain=1.0), make_frame(6, 40, gain=1.6, seed=1)
    table = analysis.changes_by_class(a, b)
    for row in table.itertuples():
        right_a, right_b = (t["Is_Correct"][t["Ground_Truth"] == row[1]].to_numpy() for t in (a, b))
        assert row.fixed == (right_b & ~right_a).sum() and row.broken == (right_a & ~right_b).sum()
        assert row.net == right_b.sum() - right_a.sum() and row.n == 40
        assert row.improvement - row.baseline == pytest.approx(row.net / 40)
        assert row.p == pytest.approx(stats.binomtest(int(row.fixed), int(row.fixed + row.broken)).pvalue)
    adjusted, running = {}, 0.0
    for rank, p in enumerate(sorted(table["p"])):
        running = max(running, min(1.0, (6 - rank) * p))
        adjusted[p] = running
    assert table["p_holm"].tolist() == pytest.approx([adjusted[p] for p in table["p"]])
    assert (table["p_holm"] > table["p"]).any() and table["net"].is_monotonic_decreasing
    wnids = {f"n{k:08}" for k in range(6)}
    assert set(table["wnid"]) == wnids and (table["wnid"].str[-1].astype(int) == table["class"]).all()


def test_classes_without_change_have_p_one():
    a = make_frame()
    table = analysis.changes_by_class(a, a)
    assert (table[["fixed", "broken", "net"]] == 0).all(axis=None) and (table[["p", "p_holm"]] == 1).all(
        axis=None
    )


def test_changes_by_pair_by_hand():
    truth = [0, 0, 0, 0, 1, 1, 2]
    a, b = table_of(truth, [1, 1, 1, 0, 1, 1, 3]), table_of(truth, [0, 0, 2, 1, 3, 1, 3])
    table = analysis.changes_by_pair(a, b)
    assert table[["kind", "name", "wrong_name", "n", "of"]].to_numpy().tolist() == [
        ["fixed", "cat", "dog", 2, 3],  # the third is still wrong, as a car
        ["broken", "cat", "dog", 1, 1],
        ["broken", "dog", "bus", 1, 1],
    ]
    swapped = analysis.changes_by_pair(b, a)
    assert swapped[swapped["kind"] == "broken"]["n"].tolist() == [2]


def test_confidence_of_right_and_wrong_answers():
    frame = make_frame(10, 30, gain=2.0)
    table = analysis.confidence_histogram(frame)
    assert len(table) == 20 and table["right"].sum() == frame["Is_Correct"].sum()
    assert table["wrong"].sum() == (~frame["Is_Correct"]).sum()
    inside = frame["Confidence"].between(0.45, 0.5, inclusive="left") & frame["Is_Correct"]
    assert table.loc[table["low"].round(2) == 0.45, "right"].item() == inside.sum() > 0
    false_rate, true_rate, _ = roc_curve(~frame["Is_Correct"], 1 - frame["Confidence"])
    assert analysis.error_auroc(frame) == pytest.approx(auc(false_rate, true_rate))
    assert analysis.error_auroc(frame) > 0.5
    assert analysis.error_auroc(frame[frame["Is_Correct"]]) is None
    assert analysis.error_auroc(frame[~frame["Is_Correct"]]) is None


def test_risk_and_coverage():
    frame = make_frame(10, 20, gain=1.5)
    table = analysis.risk_coverage(frame)
    assert table["left_out"].tolist() == pytest.approx([k / 20 for k in range(20)])
    assert table["n"].tolist() == [200 - 10 * k for k in range(20)]
    assert table["accuracy"].iloc[0] == score(frame)["accuracy"]
    for row in table.itertuples():
        left = frame[frame["Confidence"] >= row.lowest]
        assert (row.n, row.n_correct) == (len(left), left["Is_Correct"].sum())
    hand = table_of([0, 0, 0, 0], [0, 1, 0, 1], [0.9, 0.3, 0.5, 0.8])
    left = analysis.risk_coverage(hand).set_index("left_out")
    assert left.loc[[0.25, 0.5, 0.75], "accuracy"].tolist() == pytest.approx([2 / 3, 1 / 2, 1])


def test_label_suspects_by_hand():
    truth = [0, 0, 0, 0, 0, 0]
    a = table_of(truth, [1, 1, 1, 2, 1, 0], [0.9, 0.6, 0.99, 0.9, 0.8, 0.9])
    b = table_of(truth, [1, 1, 1, 3, 1, 0], [0.7, 0.8, 0.5, 0.9, 0.95, 0.9])
    table = analysis.label_suspects(a, b)
    assert table["Index"].tolist() == [4, 0, 1]  # 2: one is not sure; 3: two answers; 5: right
    assert table["both"].tolist() == [0.8, 0.7, 0.6] and set(table["said_name"]) == {"dog"}
    assert table["baseline_confidence"].tolist() == [0.8, 0.9, 0.6]
    assert table["improvement_confidence"].tolist() == [0.95, 0.7, 0.8]
    assert analysis.label_suspects(b, a)["both"].tolist() == [0.8, 0.7, 0.6]


def test_superclasses_by_hand():
    superclass_of = {0: "animal", 1: "animal", 2: "vehicle", 3: "vehicle"}
    truth = [0, 0, 0, 1, 1, 2, 2, 3]
    a = table_of(truth, [1, 2, 0, 1, 3, 3, 0, 0])
    b = table_of(truth, [0, 1, 0, 1, 0, 2, 2, 3])
    table = analysis.superclass_scores(a, b, superclass_of).set_index("superclass")
    assert table["n"].tolist() == [5, 3] and table["n_classes"].tolist() == [2, 2]
    assert table["baseline_accuracy"].tolist() == [2 / 5, 0]
    assert table["improvement_accuracy"].tolist() == [3 / 5, 1]
    assert table["baseline_within"].tolist() == [1 / 3, 1 / 3] and table["baseline_errors"].tolist() == [3, 3]
    assert table.loc["animal", "improvement_within"] == 1 and np.isnan(
        table.loc["vehicle", "improvement_within"]
    )
    assert table["chance_within"].tolist() == [1 / 3, 1 / 3]
    animals = compare(a[:5], b[:5])
    for column in ("difference", "difference_low", "difference_high", "mcnemar_p"):
        assert table.loc["animal", column] == animals[column]
    low, high = stats.binomtest(2, 5).proportion_ci(0.95, "wilson")
    assert table.loc["animal", ["baseline_low", "baseline_high"]].tolist() == pytest.approx([low, high])
    assert analysis.errors_within(table, "baseline") == pytest.approx({"share": 1 / 3, "by_chance": 1 / 3})
    assert analysis.errors_within(table, "improvement")["share"] == 1
    assert analysis.errors_within(table.assign(baseline_errors=0), "baseline") is None


def test_errors_by_chance_stay_inside_as_often_as_chance_says():
    rng = np.random.default_rng(0)
    truth_N = np.repeat(np.arange(10), 2000)
    said_N = (truth_N + rng.integers(1, 10, len(truth_N))) % 10
    frame = pd.DataFrame({"Ground_Truth": truth_N, "Prediction": said_N})
    superclass_of = {k: "small" if k < 3 else "large" for k in range(10)}
    found = analysis.errors_within(analysis.superclass_scores(frame, frame, superclass_of), "baseline")
    assert found["share"] == pytest.approx(found["by_chance"], abs=0.01)


def test_superclasses_only_where_every_class_has_one():
    a, b = two_arms()
    assert analysis.superclass_of_class(a, b, groups_of(10, 3)) == {k: f"group {k % 3}" for k in range(10)}
    assert analysis.superclass_of_class(a, b, groups_of(9, 3)) == {}
    assert analysis.superclass_of_class(a, b, {}) == {}


def test_order_keeps_superclasses_whole_and_likes_together():
    superclass_of = {k: "abc"[k % 3] for k in range(12)} | {12: "alone"}
    counts_KK = 40 * np.eye(13, dtype=int)
    for first, second in ((0, 9), (3, 6), (1, 2)):
        counts_KK[first, second] = counts_KK[second, first] = 8
    order, blocks = analysis.superclass_order(counts_KK, superclass_of)
    assert sorted(order) == list(range(13)) and sorted(blocks) == [("a", 4), ("alone", 1), ("b", 4), ("c", 4)]
    assert [superclass_of[k] for k in order] == [name for name, size in blocks for _ in range(size)]
    places = {int(k): place for place, k in enumerate(order)}
    assert abs(places[0] - places[9]) == 1 and abs(places[3] - places[6]) == 1
    names = [name for name, _ in blocks]
    assert abs(names.index("b") - names.index("c")) == 1  # 1 and 2 are taken for each other


def test_gallery_rows():
    frame = make_frame(30, 12, gain=2.0)
    rows = analysis.gallery_rows(frame)
    chosen = frame.iloc[rows]
    assert len(set(rows)) == len(rows) and chosen["Ground_Truth"].is_monotonic_increasing
    for label, of_class in frame.groupby("Ground_Truth"):
        right = chosen[chosen["Ground_Truth"] == label]["Is_Correct"].tolist()
        n_right = of_class["Is_Correct"].sum()
        assert right == [True] * min(2, n_right) + [False] * min(3, 12 - n_right)
    assert rows.tolist() == analysis.gallery_rows(frame).tolist()
    assert not (chosen.groupby("Ground_Truth").head(1)["Index"] % 12 == 0).all()  # drawn, not the first


def test_sprite_sheet_puts_each_image_at_its_position():
    pixels = np.zeros((43, 16, 16, 3), np.uint8)
    pixels[..., 0] = np.arange(43)[:, None, None] * 5
    sheet = np.asarray(analysis.sprite_sheet(pixels))
    assert sheet.shape == (128, 2560, 3)
    for position in (0, 7, 39, 40, 42):
        line, column = position // 40, position % 40
        cell = sheet[64 * line : 64 * line + 64, 64 * column : 64 * column + 64]
        assert (cell == [5 * position, 0, 0]).all()
    assert (sheet[64:, 3 * 64 :] == 255).all()


def test_every_file_is_there_and_follows_from_the_predictions(tmp_path):
    a, b = two_arms(40, 8)
    arms_with(tmp_path, a, b.sample(frac=1, random_state=0), n_classes=40)
    found = analysis.write_analysis(tmp_path, images, groups_of(40, 7))
    folder = tmp_path / "analysis"
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES + OF_SUPERCLASSES)
    assert found == json.loads((folder / "analysis.json").read_text())
    for arm, frame in (("baseline", a), ("improvement", b)):
        predictions = tmp_path / arm.capitalize() / f"{arm}_validation_predictions.csv"
        assert found["source_sha256"][arm] == sha256(predictions)
        for key in ("n_correct", "accuracy", "ece"):
            assert found[arm][key] == pytest.approx(score(frame)[key], rel=1e-7)
        sorted_N = frame.sort_values("Confidence")["Is_Correct"].to_numpy()
        assert found[arm]["accuracy_without_least_confident"]["0.5"] == pytest.approx(
            sorted_N[len(frame) // 2 :].mean(), rel=1e-7
        )
        wrong = frame[~frame["Is_Correct"]]
        assert found[arm]["mean_confidence_wrong"] == pytest.approx(wrong["Confidence"].mean(), rel=1e-7)
    assert (found["fixed"], found["broken"]) == tuple(compare(a, b)[f"only_{x}_correct"] for x in "ba")
    alike = (a["Prediction"] == b["Prediction"]) & ~a["Is_Correct"]
    assert found["wrong_in_both_alike"] == alike.sum() <= found["wrong_in_both"]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width == 1170 and 200 < picture.height < 1700, path.name
    gallery = pd.read_csv(folder / "gallery.csv", keep_default_na=False)
    with Image.open(folder / "gallery.webp") as sheet:
        assert sheet.width == 2560 and sheet.height == 64 * -(-len(gallery) // 40)
    at = gallery.iloc[5]
    assert at["class"] == a["Ground_Truth"][at["Index"]] and at["baseline"] == a["Prediction"][at["Index"]]
    assert at["improvement_name"] == b["Prediction_Name"][at["Index"]] and at["position"] == 5
    pairs = pd.read_csv(folder / "confused_pairs.csv", keep_default_na=False, dtype={"first_rows": str})
    first = analysis.confused_pairs(b).iloc[0]
    written = pairs[pairs["arm"] == "improvement"].iloc[0]
    assert written["n"] == first["n"] and written["first_rows"].split() == [
        str(r) for r in first["first_rows"]
    ]


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "draw", lambda *_: {})
    arms_with(tmp_path, *two_arms())
    folder = tmp_path / "analysis"
    with_them = analysis.write_analysis(tmp_path, images, groups_of(10, 3))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "confusion_blocks.png").touch()
    without = analysis.write_analysis(tmp_path, images, {})
    assert {p.name for p in folder.iterdir()} == set(before) - {"superclasses.csv"}
    for name in set(before) - {"analysis.json", "superclasses.csv"}:
        assert before[name] == (folder / name).read_bytes(), name
    assert with_them.pop("superclasses")["n"] == 3 and with_them == without


@pytest.mark.parametrize("gain", [100.0, -100.0])
def test_all_right_and_all_wrong_can_be_written(tmp_path, monkeypatch, gain):
    monkeypatch.setattr(report, "DPI", 20)
    arms_with(tmp_path, make_frame(3, 4, gain=-100), make_frame(3, 4, gain=gain))
    found = analysis.write_analysis(tmp_path, images, groups_of(3, 2))
    assert found["improvement"]["error_auroc"] is None and found["broken"] == 0
    assert found["improvement"]["n_errors"] == (0 if gain > 0 else 12)
    assert (found["superclasses"]["improvement_errors_within"] is None) == (gain > 0)
    assert bool(found["pairs"]["fixed"]) == (gain > 0) and found["pairs"]["broken"] == []


def test_what_cannot_be_analysed_is_named(tmp_path):
    a, b = two_arms()
    leave(tmp_path, "baseline", a)
    with pytest.raises(
        SetupError, match=r"improvement_validation_predictions.csv does not exist.*run the one"
    ):
        analysis.write_analysis(tmp_path, images, {})
    leave(tmp_path, "improvement", b[1:])
    with pytest.raises(SetupError, match="120 and 119 rows"):
        analysis.write_analysis(tmp_path, images, {})
    arms_with(tmp_path, a[1:], b[1:])
    with pytest.raises(SetupError, match="is not 0 to 118"):
        analysis.write_analysis(tmp_path, images, {})
    assert not (tmp_path / "analysis").exists()


def every_figure(n_classes: int, per_class: int, superclasses: dict[str, str]) -> dict:
    a, b = (t.assign(Confidence=t["Confidence"] ** 0.2) for t in two_arms(n_classes, per_class))
    superclass_of = analysis.superclass_of_class(a, b, superclasses)
    tables = analysis.make_tables(a, b, superclass_of)
    return analysis.draw(a, b, tables, images, ({**ABOUT, "image_size": 64}, ABOUT), superclass_of)


@pytest.mark.parametrize(
    ("n_classes", "per_class", "superclasses"),
    [(10, 20, {}), (200, 5, groups_of(200, 20))],
    ids=["10", "200"],
)
def test_no_text_leaves_its_figure_or_covers_another_and_footers_are_whole(
    n_classes, per_class, superclasses
):
    for name, figure in every_figure(n_classes, per_class, superclasses).items():
        assert_legible(figure, name)
        text = said(figure)
        assert report.footer(ABOUT) in text and "No image" not in text, name
        of_both = name not in ("confused_pairs", "confusion_blocks")
        assert ("some_net.in1k · 64 px" in text) == of_both, name


def test_few_superclasses_are_drawn_in_order_of_accuracy():
    a, b = two_arms()
    table = analysis.superclass_scores(a, b, {k: "vehicle" if k < 4 else "animal" for k in range(10)})
    figure = figures.superclass_figure(table, "note")
    assert_legible(figure, "superclasses")
    best = table.sort_values("improvement_accuracy", ascending=False)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"{row.superclass}  {row.n_classes}" for row in best.itertuples()]


def test_images_stand_beside_their_own_words():
    frame = make_frame(10, 8, gain=1.2)
    table = analysis.label_suspects(frame.assign(Confidence=0.9), frame.assign(Confidence=0.8))
    figure = figures.suspects_figure(table, images, "note")
    shown = [axes for axes in figure.axes if axes.get_images()]
    assert len(shown) == min(20, len(table)) > 0
    for axes, row in zip(shown, table.itertuples(), strict=False):
        assert axes.get_images()[0].get_array()[0, 0, 0] == table["Index"][row.Index]
        assert axes.get_title(loc="center") == figures.clean(row.name, 20)
        said_name = figures.clean(row.said_name, 20)
        assert axes.texts[0].get_text() == f"{said_name}\nbaseline 90 %\nimprovement 80 %"
    pairs = analysis.confused_pairs(frame)
    figure = figures.confused_pairs_figure(pairs, images, "note", "Improvement")
    for line, pair in enumerate(pairs.head(6).itertuples()):
        for part, rows in zip(
            figure.subfigs[2 * line : 2 * line + 2], (pair.first_rows, pair.second_rows), strict=True
        ):
            found = [axes.get_images()[0].get_array()[0, 0, 0] for axes in part.axes if axes.get_images()]
            assert found == rows


def test_what_is_fixed_is_blue_and_what_is_broken_orange_in_whole_words():
    classes = pd.DataFrame(
        {"name": ["cat", "dog"], "net": [3, -2], "fixed": [4, 1], "broken": [1, 3], "p_holm": [1.0, 1.0]}
    )
    row = {"name": "golden retriever", "wrong_name": "Labrador retriever", "n": 2, "of": 3}
    pairs = pd.DataFrame([{**row, "kind": "fixed"}, {**row, "kind": "broken", "wrong_name": "cat"}])
    figure = figures.changes_figure(classes, pairs, "note")
    drawn = [[to_hex(bar.get_facecolor()).upper() for bar in axes.patches] for axes in figure.axes]
    assert drawn == [2 * [BLUE] + 2 * [ORANGE], ["#E4E4E4", BLUE], ["#E4E4E4", ORANGE]]
    assert "fixes (blue) and breaks (orange)" in said(figure)
    assert "golden retriever →\nLabrador retriever" in said(figure) and "golden retriever → cat" in said(
        figure
    )


def test_blocks_are_framed_and_named():
    counts_KK = 40 * np.eye(60, dtype=int)
    counts_KK[0, 1], counts_KK[0, 50] = 3, 1
    blocks = [("one", 1), ("two", 2), ("many", 57)]
    order = [59, *range(59)]
    figure = figures.confusion_blocks(
        counts_KK[np.ix_(order, order)], [f"thing {k}" for k in order], blocks, "note", "Improvement"
    )
    matrix = figure.axes[0]
    frames = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in matrix.patches]
    assert frames == [(-0.5, -0.5, 1, 1), (0.5, 0.5, 2, 2), (2.5, 2.5, 57, 57)]
    assert [t.get_text() for t in matrix.get_yticklabels()] == ["one  1", "two  2", "many  57"]
    assert "75 % of the 4 errors" in said(figure)
    assert "thing 0\n→ thing 1  3 of 44" in said(figure)
    assert_legible(figure, "blocks")
