"""The page: nothing to load, every value escaped, numbers as in the files; and what it does in a browser."""

import base64
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from statsmodels.stats.proportion import proportion_confint
from test_report import ABOUT, make_frame, make_history

from src import SetupError, analysis, report
from src.evaluate import compare, confusion, reliability, score, write_predictions
from src.files import read_json, write_json
from src.page import charts, read, render, sections, write_page
from src.studies import ABLATION
from src.studies.table import summarise
from tools import check

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = [
    '<script>alert("x")</script>',
    "</script><img src=x onerror=alert(1)>, closed",
    'a & b\'s "quoted" & <b>bold</b>',
    "{{ 7 * 7 }} ${7 * 7}",
    "water bottle, flask",
]
RUN = {
    **ABOUT,
    "n_holdout": 40,
    "epochs": 3,
    "best_epoch": 2,
    "gflops": 1,
    "seconds": {"total": 90.0},
    "versions": {"python": "3.11"},
    "git_commit": "c0ffee",
    "config": {"train": {"monitor": "loss"}},
}
STUDY = {
    "n_correct": 80,
    "n": 100,
    "valid_accuracy": 0.801,
    "best_epoch": 1,
    "epochs": 6,
    "minutes": 10.84,
    "hardware": "A100",
    "backbone": "large_net.in1k",
    "image_size": 224,
    "monitor": "valid loss",
}


def leave(results: Path, arm: str, frame: pd.DataFrame, **about) -> None:
    folder = results / arm.capitalize()
    write_predictions(frame, folder / f"{arm}_validation_predictions.csv")
    report.write_csv(make_history(3), folder / f"{arm}_history.csv")
    write_json(folder / "metrics.json", {"arm": arm, **RUN, **score(frame), **about})


def leave_gallery(results: Path, a: pd.DataFrame, b: pd.DataFrame) -> None:
    rows = analysis.gallery_rows(b)
    pixels = np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), 8, 8, 3))
    report.write_csv(analysis.gallery_table(a, b, rows), results / "analysis" / "gallery.csv")
    analysis.sprite_sheet(np.ascontiguousarray(pixels)).save(results / "analysis" / "gallery.webp")
    used = analysis.sources(results, read.ARMS)
    facts = {"gallery": {"columns": 40, "thumbnail": 64}, "source_sha256": used}
    write_json(results / "analysis" / "analysis.json", facts)


def leave_ablation(results: Path) -> pd.DataFrame:
    """Two rows of the grid over three seeds."""
    lines = [
        {
            "row": row,
            "seed": seed,
            "config": "ab",
            "valid_accuracy": accuracy + 0.001 * seed * (row != "baseline"),
        }
        for row, accuracy in (("baseline", 0.5), ("+ full fine-tuning", 0.6))
        for seed in range(3)
    ]
    same = {"holdout_accuracy": 0.5, "valid_loss": 1, "valid_ece": 0.1, "seconds": 9, "parameters": 7}
    same |= {"gflops": 1, "epochs": 2, "n_fit": 100, "backbone": "some_net.in1k", "image_size": 64}
    same |= {"data": "made up", "protocol": "holdout", "hardware": "a CPU"}
    table = pd.DataFrame(lines).assign(**same)
    report.write_csv(table, results / "ablation" / "ablation.csv", inert=False)
    report.write_csv(summarise(ABLATION, table), results / "ablation" / "summary.csv", inert=False)
    return summarise(ABLATION, table)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """Everything that the page can show, of twelve classes with hostile names; the page and its parts."""
    results = tmp_path_factory.mktemp("page") / "results"
    wnids = pd.read_csv(analysis.SUPERCLASSES)["wnid"][::16].tolist()[:12]
    names = HOSTILE + [f"kind {k}" for k in range(7)]
    frames = {}
    for seed, (arm, gain) in enumerate((("baseline", 1.0), ("improvement", 2.2), ("best", 2.6))):
        frame = make_frame(12, 10, gain, seed)
        for side in ("Ground_Truth", "Prediction"):
            frame[f"{side}_Name"] = frame[side].map(dict(enumerate(names)))
            frame[f"{side}_Wnid"] = frame[side].map(dict(enumerate(wnids)))
        if arm == "best":
            frame.insert(9, "Calibrated_Confidence", 0.9 * frame["Confidence"])
        frames[arm] = frame
        leave(results, arm, frame)
    report.write_comparison(results)
    leave_gallery(results, frames["baseline"], frames["improvement"])
    facts = {key: {"value": value, "source": "slides"} for key, value in STUDY.items()}
    write_json(results / "study.json", {"title": "A study", "baseline": facts})
    summary = leave_ablation(results)
    path = write_page(results)
    text = path.read_text(encoding="utf-8")
    return SimpleNamespace(
        results=results, path=path, text=text, page=Page(text), names=names, frames=frames, ablation=summary
    )


class Page(HTMLParser):
    """Elements in order, each with its attributes and the text within it; fails where tags do not match."""

    VOID = {"meta", "input", "br", "img", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        assert len(dict(attributes)) == len(attributes)
        element = SimpleNamespace(tag=tag, at=dict(attributes), text="", inside=list(self.open))
        self.elements.append(element)
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list:
        return [e for e in self.elements if e.tag == tag and attributes.items() <= e.at.items()]

    def within(self, tag: str, section: str) -> list:
        return [e for e in self.all(tag) if any(parent.at.get("id") == section for parent in e.inside)]

    def cells(self, section: str) -> list[list[str]]:
        """Texts of the rows of all tables in a section."""
        rows = self.within("tr", section)
        parts = [e for e in self.elements if e.tag in ("th", "td")]
        return [[" ".join(c.text.split()) for c in parts if row in c.inside] for row in rows]


def test_the_page_loads_nothing_and_runs_only_its_own_script(whole):
    assert whole.path.stat().st_size < 5_000_000
    for element in whole.page.elements:
        assert not {"src", "srcset", "action", "data", "poster"} & set(element.at), element
        assert not [name for name in element.at if name.startswith("on")], element
        assert element.at.get("href", "#").startswith("#") and element.tag not in ("link", "iframe", "img")
    style = "".join(e.text for e in whole.page.all("style"))
    assert re.findall(r"url\(.{12}", style) == ['url("data:image/'] and "@import" not in style
    assert not re.search(r"https?:|fetch\(|XMLHttp|import\s*\(", whole.text)
    data, script = whole.page.all("script")
    assert data.at == {"type": "application/json", "id": "data"}
    policy = whole.page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0].at["content"]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_parts_refer_to_parts_that_are_there(whole):
    ids = [e.at["id"] for e in whole.page.elements if "id" in e.at]
    assert len(ids) == len(set(ids))
    for element in whole.page.elements:
        for key in ("aria-labelledby", "aria-describedby", "aria-controls"):
            assert set(element.at.get(key, "").split()) <= set(ids)
        assert element.at.get("href", "#main")[1:] in ids
    for control in whole.page.all("input") + whole.page.all("select"):
        assert any(parent.tag == "label" for parent in control.inside)
    for heading in whole.page.within("th", "class-table"):
        assert "aria-sort" not in heading.at or [e for e in whole.page.all("button") if heading in e.inside]
    assert [e.at["lang"] for e in whole.page.all("html")] == ["en"]


def test_class_names_stay_text(whole):
    assert '<script>alert("x")' not in whole.text and "<b>bold" not in whole.text
    assert "49" not in [word for row in whole.page.cells("class-table") for word in row[0].split()]
    links = {e.at["data-class"]: e for e in whole.page.within("a", "class-table")}
    for label, name in enumerate(whole.names):
        assert links[str(label)].text == name.split(", ")[0]
        assert links[str(label)].at["title"].startswith(f"{name} (n")
    assert read_data(whole.page)["names"] == whole.names


def read_data(page: Page) -> dict:
    return json.loads(page.all("script", id="data")[0].text)


def test_headline_numbers_are_those_of_the_files(whole):
    rows = {row[0]: row for row in whole.page.cells("accuracy")[1:]}
    assert list(rows) == [
        "Baseline, reported by the study",
        *(f"{arm}, measured" for arm in ("Baseline", "Improvement", "Best")),
    ]
    low, high = proportion_confint(80, 100, method="wilson")
    assert rows["Baseline, reported by the study"][1:] == [
        f"80.10 %[{100 * low:.2f}, {100 * high:.2f}]80.00 % counted by row",
        *("100", "large_net.in1k", "224 px", "valid loss", "1 of 6", "A100", "10.8 min"),
    ]
    for arm in ("baseline", "improvement", "best"):
        m = read_json(whole.results / arm.capitalize() / "metrics.json")
        interval = f"[{100 * m['wilson_low']:.2f}, {100 * m['wilson_high']:.2f}]"
        assert rows[f"{arm.capitalize()}, measured"][1:] == [
            f"{100 * m['accuracy']:.2f} %{interval}",
            *("120", "some_net.in1k", "96 px", "holdout loss", "2 of 3", "a CPU (2 cores)", "90 s"),
        ]
    c = read_json(whole.results / "comparison.json")
    assert f"{100 * c['difference']:+.2f} points against" in whole.page.all("h1")[0].text.replace("\xa0", " ")
    counts = [e.text for e in whole.page.within("strong", "difference")]
    parts = ("both_correct", "only_b_correct", "only_a_correct", "both_wrong")
    assert counts == [str(c[key]) for key in parts] and sum(map(int, counts)) == c["n"]
    bar = [e.at for e in whole.page.within("rect", "difference")]
    assert [float(at["width"][:-1]) for at in bar] == [
        pytest.approx(100 * c[key] / c["n"], abs=1e-3) for key in parts
    ]
    assert float(bar[3]["x"][:-1]) == pytest.approx(100 - 100 * c["both_wrong"] / c["n"], abs=1e-3)


def test_classes_have_the_numbers_of_each_class_alone(whole):
    a, b = whole.frames["baseline"], whole.frames["improvement"]
    rows = whole.page.cells("class-table")[1:]
    assert len(rows) == 12
    for label, row in enumerate(rows):
        alone = compare(a[a["Ground_Truth"] == label], b[b["Ground_Truth"] == label])
        for cell, arm in zip(row[2:4], ("a", "b"), strict=True):
            bounds = [f"{100 * alone[arm][f'wilson_{side}']:.0f}" for side in ("low", "high")]
            assert cell == f"{100 * alone[arm]['accuracy']:.0f} % [{', '.join(bounds)}]"
        shown = [f"{100 * alone[f'difference{side}']:+.0f}" for side in ("", "_low", "_high")]
        assert row[5] == f"{shown[0]} [{shown[1]}, {shown[2]}]".replace("-", "−")
        wrong = b[(b["Ground_Truth"] == label) & ~b["Is_Correct"]]["Prediction_Name"].mode()
        assert not len(wrong) or row[6] in [name.split(", ")[0] for name in wrong]


def test_confusions_are_those_of_the_predictions(whole):
    data = read_data(whole.page)
    assert sorted(data["order"]) == list(range(12)) and sum(n for _, n in data["blocks"]) == 12
    for arm in data["arms"]:
        counts_KK = np.zeros((12, 12), int)
        for truth, said, count in np.reshape(arm["cells"], (-1, 3)):
            counts_KK[truth, said] = count
        assert (counts_KK == confusion(whole.frames[arm["name"]], 12)).all()
    counts = {arm: confusion(frame, 12) for arm, frame in whole.frames.items()}
    either_way = np.triu(counts["improvement"] + counts["improvement"].T, 1)
    rows = [row for row in whole.page.cells("confusions") if "⇄" in row[0]]
    assert int(rows[0][3].split()[0]) == either_way.max()
    found = sections.pairs(read.read_results(whole.results), list(counts.values()))["rows"]
    for row, pair in zip(rows, found, strict=True):
        i, j = whole.names.index(pair["first"]), whole.names.index(pair["second"])
        for cell, counts_KK in zip(row[2:], counts.values(), strict=True):
            there, back = counts_KK[i, j], counts_KK[j, i]
            assert cell == f"{there + back} {there} + {back}"


def test_the_head_of_the_page_names_the_network_that_was_run(whole):
    lead = re.search(r'<p class="lead">(.*?)</p>', whole.text, re.DOTALL)[1]
    assert lead.startswith(f"{ABOUT['backbone']} at {ABOUT['image_size']}&nbsp;px: 120 images")


def test_the_study_s_title_stands_over_convnext_s_numbers_alone(whole):
    found = read.read_results(whole.results)

    def kicker(*backbones: str) -> str:
        arms = tuple(
            replace(arm, metrics=arm.metrics | {"backbone": backbone})
            for arm, backbone in zip(found.arms, backbones, strict=True)
        )
        return re.search(r'<p class="kicker">(.*?)</p>', render(replace(found, arms=arms)))[1]

    convnext = "convnext_tiny.fb_in1k"
    assert kicker(convnext, convnext, convnext) == "A study"
    assert kicker(convnext, convnext, "some_net.in1k") == "Fine-tuning, measured"
    assert '<p class="kicker">Fine-tuning, measured</p>' in whole.text


def test_the_page_says_that_the_best_recipe_has_seen_the_valid_images(whole):
    found = read.read_results(whole.results)
    said = "Best was composed after seeing it: its number is optimistic"
    assert said in whole.text and said not in render(replace(found, arms=found.arms[:2]))
    assert said not in render(replace(found, ablation=None))


def test_ablation_calibration_and_provenance(whole):
    header, *rows = whole.page.cells("ablation")
    assert [row[0] for row in rows] == ["baseline", "+ full fine-tuning"]
    line = whole.ablation.iloc[1]
    low, high = f"{100 * line['low']:+.2f}", f"{100 * line['high']:+.2f}"
    assert rows[1][1:] == ["60.10 % ± 0.10", "3", "", f"+10.10 [{low}, {high}]", "helps", "baseline"]
    assert rows[0][4:] == ["", "", ""] and len(whole.page.within("circle", "ablation")) == 1
    for arm, row in zip(whole.frames, whole.page.cells("calibration")[1:], strict=True):
        m = score(whole.frames[arm])
        fitted = f"{100 * m['ece_calibrated']:.1f} %" if "ece_calibrated" in m else "–"
        assert row[1:3] == [f"{100 * m['ece']:.1f} %", fitted] and (fitted == "–") == (arm != "best")
        assert row[3:] == [f"{m['loss']:.3f}", f"{100 * m['top5_accuracy']:.2f} %"]
    footer = whole.text.partition("<footer>")[2]
    assert all(said in footer for said in ("some_net.in1k", "abc", "c0ffee", "python&nbsp;3.11"))


def test_charts_place_values_by_hand():
    axis = charts.Axis.over([0.52, 0.87])
    assert (axis.low, axis.high) == (0.5, 0.9) and [label for _, label in axis.ticks][::4] == ["50 %", "90 %"]
    assert [axis.at(v) for v in (0.5, 0.6, 0.9, 2)] == ["0.00%", "25.00%", "100.00%", "100.00%"]
    assert [axis.up(v) for v in (0.5, 0.6, 0.9, 0)] == ["100.00%", "75.00%", "0.00%", "100.00%"]
    around = charts.Axis.around_zero(0.07)
    assert around.at(0) == "50.00%" and [label for _, label in around.ticks] == ["−5", "0", "+5"]


def test_curves_and_calibration_show_every_value(whole):
    arms = read.read_results(whole.results).arms
    chart = charts.curves(arms, "accuracy")
    history = make_history(3)
    assert [mark.says for mark in chart.marks][1] == "epoch 2. " + ". ".join(
        f"{arm} (best epoch): fit {100 * history['fit_accuracy'][1]:.2f}\xa0%, "
        f"held-out {100 * history['holdout_accuracy'][1]:.2f}\xa0%"
        for arm in ("Baseline", "Improvement", "Best")
    )
    assert chart.lines[1].points == tuple(zip((1, 2, 3), history["holdout_accuracy"].round(8), strict=True))
    rings = [dot.x for mark in chart.marks for dot in mark.dots if "chosen" in dot.style]
    assert rings == [2, 2, 2]
    drawn = [dot for mark in charts.calibration(arms[:1]).marks for dot in mark.dots]
    table = reliability(whole.frames["baseline"])
    for column, values in (
        ("confidence", [dot.x for dot in drawn]),
        ("accuracy", [dot.value for dot in drawn]),
        ("wilson_low", [dot.low for dot in drawn]),
        ("wilson_high", [dot.high for dot in drawn]),
    ):
        assert values == pytest.approx(table[column].tolist())


def test_classes_of_the_chart_rise_with_the_first_arm(whole):
    table = sections.class_table(read.read_results(whole.results))
    marks = charts.every_class(table, ["baseline", "improvement"]).marks
    values = [mark.dots[0].value for mark in marks]
    assert values == sorted(table["baseline"]) and {mark.says.split(":")[0] for mark in marks} <= {
        name.split(":")[0] for name in whole.names
    }


def test_same_results_give_the_same_bytes(whole):
    assert write_page(whole.results) == whole.path
    assert whole.path.read_bytes() == whole.text.encode()


def test_one_arm_alone_is_a_page(tmp_path):
    leave(tmp_path, "baseline", make_frame(), protocol="published", test_size=128)
    text = write_page(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "against the baseline" not in page.all("h1")[0].text and "counted by row" not in text
    said = {e.inside[-1].at["id"]: " ".join(e.text.split()) for e in page.all("p", **{"class": "missing"})}
    assert list(said) == ["difference", "images", "ablation"]
    assert "make baseline improvement" in said["difference"] and "make analysis" in said["images"]
    assert "make ablation" in said["ablation"]
    row = page.cells("accuracy")[1]
    assert row[4:6] == ["96 px, tested at 128 px", "valid loss"]
    assert "optimistic" in text and "on which no choice was made" not in text
    assert read_data(page)["blocks"] == [] and not page.all("a", **{"data-class": "0"})


def test_a_gallery_of_earlier_runs_is_left_out(whole, tmp_path):
    results = shutil.copytree(whole.results, tmp_path / "results")
    again = whole.frames["baseline"]
    leave(results, "baseline", again.assign(Confidence=again["Confidence"] / 2))
    page = Page(render(read.read_results(results)))
    assert any("belong to runs before" in e.text for e in page.within("p", "images"))
    assert "data:image" not in "".join(e.text for e in page.all("style"))
    shutil.rmtree(results / "Improvement")  # and what compares both arms goes with one of them
    page = Page(render(read.read_results(results)))
    missing = [" ".join(e.text.split()) for e in page.all("p", **{"class": "missing"})]
    assert [text.split(":")[0] for text in missing] == [
        "There is no comparison",
        "The images are not here yet. make analysis draws them.",
    ]
    assert "What the best confuses most" in [e.text for e in page.all("h3")]


def test_what_cannot_be_shown_is_said(tmp_path):
    with pytest.raises(SetupError, match="run an arm first"):
        write_page(tmp_path)
    leave(tmp_path, "baseline", make_frame())
    leave(tmp_path, "improvement", make_frame(9))
    with pytest.raises(SetupError, match="different images or classes"):
        write_page(tmp_path)
    leave(tmp_path, "improvement", make_frame().assign(Ground_Truth_Name="other"))
    with pytest.raises(SetupError, match="different images or classes"):
        write_page(tmp_path)
    (tmp_path / "Baseline" / "baseline_history.csv").unlink()
    with pytest.raises(SetupError, match="baseline_history.csv does not exist"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(not (ROOT / "results" / "Baseline" / "metrics.json").exists(), reason="no results yet")
def test_the_repository_s_own_results_make_a_page():
    text = render(read.read_results(ROOT / "results"))
    assert len(text.encode()) < 5_000_000 and not re.search(
        r"\b(nan|None|inf)\b", Page(text).all("main")[0].text
    )
    for arm in ("Baseline", "Improvement"):
        assert f"{100 * read_json(ROOT / 'results' / arm / 'metrics.json')['accuracy']:.2f}\xa0%" in text


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    shares = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_colours_have_contrast_in_light_and_dark():
    style = (Path(read.__file__).parent / "style.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6});", part))
        for part in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 2 and schemes[0]["blue"] == "#0072b2" and schemes[0]["orange"] == "#d55e00"
    for scheme in schemes:
        for name, least in [(n, 4.5) for n in ("ink", "soft", "blue-text", "orange-text", "green-text")] + [
            (n, 3) for n in ("blue", "orange", "green", "grey")
        ]:
            for ground in ("page", "panel"):
                dark, light = sorted([luminance(scheme[name]), luminance(scheme[ground])])
                assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


# In a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; skips where it, its driver or selenium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    chromium, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with its driver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def opened(browser, whole):
    """The page, opened anew on a desktop, without motion; the console has nothing to complain of."""
    emulate(browser, 1280, prefers_reduced_motion="reduce")
    browser.get(whole.path.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def emulate(browser, width: int, **features: str) -> None:
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})


def ask(browser, script: str, *arguments):
    return browser.execute_script(f"return {script}", *arguments)


def texts(browser, selector: str) -> list[str]:
    return ask(browser, "[...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)


def press(browser, *keys: str, shift: bool = False) -> None:
    from selenium.webdriver import ActionChains, Keys

    chain = ActionChains(browser)
    if shift:
        chain.key_down(Keys.SHIFT)
    for key in keys:
        chain.send_keys(getattr(Keys, key, key))
    if shift:
        chain.key_up(Keys.SHIFT)
    chain.perform()


def focus(browser, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).focus()", selector)


def choose(browser, selector: str, value: str) -> None:
    browser.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, { bubbles: true }))",
        *(selector, value),
    )


def test_browser_asks_for_nothing_and_shows_names_as_text(opened, whole):
    assert (
        ask(
            opened, "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        )
        == 0
    )
    assert texts(opened, "#class-table tbody th a") == [name.split(", ")[0] for name in whole.names]
    assert ask(opened, "document.images.length") == 0


ROWS = "[...document.querySelectorAll('#class-table tbody tr')]"


def test_browser_sorts_by_every_heading(opened, whole):
    table = sections.class_table(read.read_results(whole.results))
    columns = ("baseline", "improvement", "best", "change")
    headings = texts(opened, "#class-table thead th[aria-sort]")
    for place, column in enumerate(columns, 1):
        for direction in ("descending", "ascending"):
            focus(opened, f"#class-table th[aria-sort]:nth-of-type({place + 2}) button")
            press(opened, "ENTER")
            shown = ask(
                opened,
                f"{ROWS}.map(row => +row.cells[arguments[0]].dataset.value)",
                place + 1,
            )
            assert shown == pytest.approx(sorted(table[column], reverse=direction == "descending")), column
            sorts = ask(opened, "[...document.querySelectorAll('[aria-sort]')].map(e => e.ariaSort)")
            assert sorts == [direction if i == place else "none" for i in range(len(headings))]
    opened.find_element("css selector", "#class-table th:first-child button").click()
    kinds = [name for name in texts(opened, "#class-table tbody th a") if name.startswith("kind")]
    assert kinds == [f"kind {k}" for k in range(7)]


def test_browser_search_keeps_what_matches(opened):
    visible = f"{ROWS}.filter(row => row.checkVisibility())"
    box = opened.find_element("css selector", "#search")
    box.send_keys("KIND 3")
    words = ask(opened, f"{visible}.map(r => r.dataset.words.toLowerCase())")
    assert words and all("kind 3" in word for word in words) and len(words) < 12
    assert texts(opened, "#n-classes") == [f"{len(words)} of 12 classes"]
    box.clear()
    box.send_keys("flask")  # a second synonym
    assert any("flask" in word for word in ask(opened, f"{visible}.map(r => r.dataset.words)"))
    box.clear()
    box.send_keys(" ")
    assert ask(opened, f"{visible}.length") == 12


CARDS = """[...document.querySelectorAll('#cards li')].map(card => {
    const style = card.querySelector('.thumbnail').style, [x, y] = style.backgroundPosition.split(' ');
    return [parseFloat(x), parseFloat(y), card.querySelector('.truth').title,
            ...[...card.querySelectorAll('p:not(.truth)')].map(p => p.textContent)];
})"""


def shown_images(browser, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the gallery whose cards are shown, by the place of the sheet that each card is cut from."""
    lines, positions = -(-len(table) // 40), []
    for x, y, truth, *said in ask(browser, CARDS):
        position = round(x / 100 * 39) + 40 * round(y / 100 * (lines - 1))
        row = table.loc[position]
        assert truth == row["name"]
        for arm, text in zip(("baseline", "improvement"), said, strict=True):
            mark = "right: ✓" if row[arm] == row["class"] else "wrong: ✗"
            name, sure = row[f"{arm}_name"].split(", ")[0], round(100 * row[f"{arm}_confidence"] + 1e-9)
            assert text == f"{arm} {mark} {name} {sure}\xa0%"
        positions.append(position)
    return table.loc[positions]


def test_browser_filters_the_images(opened, whole):
    table = pd.read_csv(whole.results / "analysis" / "gallery.csv").set_index("position")
    assert len(table) > 40  # more than one line of the sheet
    right = {arm: table[arm] == table["class"] for arm in ("baseline", "improvement")}
    wanted = {
        "gained": right["improvement"] & ~right["baseline"],
        "lost": right["baseline"] & ~right["improvement"],
        "both wrong": ~right["baseline"] & ~right["improvement"],
    } | {f"{arm} {kind}": right[arm] == (kind == "right") for arm in right for kind in ("right", "wrong")}
    offered = ask(opened, "[...document.querySelectorAll('#of-answer option')].map(o => o.value)")
    assert set(offered) == {"", *wanted}
    for value, keep in wanted.items():
        choose(opened, "#of-answer", value)
        if ask(opened, "document.querySelector('#more').checkVisibility()"):
            opened.find_element("css selector", "#more").click()
        assert sorted(shown_images(opened, table).index) == table.index[keep].tolist(), value
        assert texts(opened, "#n-images") == [f"{keep.sum()} of {len(table)} images"]
    choose(opened, "#of-class", "4")
    assert (shown_images(opened, table)["class"] == 4).all()
    opened.find_element("css selector", "#class-table a[data-class='7']").click()
    found = shown_images(opened, table)
    assert sorted(found.index) == table.index[table["class"] == 7].tolist()
    assert ask(opened, "document.querySelector('#of-class').value") == "7"


def test_thumbnails_are_cut_from_their_place_of_the_sheet(whole):
    """The sheet inside the page is the file's, and its tiles are in the order of the table."""
    style = whole.page.all("style")[0].text
    sheet = base64.b64decode(re.search(r"base64,([^\"]+)", style)[1])
    assert sheet == (whole.results / "analysis" / "gallery.webp").read_bytes()
    with Image.open(io.BytesIO(sheet)) as picture:
        grey = np.asarray(picture.convert("L"))[32::64, 32::64].ravel()
    table = pd.read_csv(whole.results / "analysis" / "gallery.csv")
    assert np.abs(grey[: len(table)].astype(int) - table["Index"] % 256).max() < 12


def test_browser_reads_the_matrix_by_keys_and_pointer(opened, whole):
    data, said = read_data(whole.page), whole.names
    counts = {
        arm: confusion(frame, 12)[np.ix_(data["order"], data["order"])] for arm, frame in whole.frames.items()
    }

    def reads(arm: str, row: int, column: int) -> None:
        names = [said[data["order"][i]].split(", ")[0] for i in (row, column)]
        total = counts[arm][row].sum()
        assert texts(opened, "#matrix-says p") == [
            f"truth {names[0]}",
            f"answer {names[1]}",
            f"images {counts[arm][row, column]} of {total}",
        ]

    worst = counts["improvement"] * (1 - np.eye(12, dtype=int))
    reads("improvement", *np.unravel_index(worst.argmax(), worst.shape))
    focus(opened, "#matrix")
    press(opened, "ARROW_UP", "ARROW_LEFT", shift=True)
    press(opened, "ARROW_UP", "ARROW_LEFT", shift=True)
    reads("improvement", 0, 0)
    press(opened, "ARROW_DOWN", "ARROW_DOWN", "ARROW_RIGHT")
    reads("improvement", 2, 1)
    press(opened, "ARROW_RIGHT", shift=True)
    reads("improvement", 2, 11)
    press(opened, "HOME")
    reads("improvement", 2, 2)
    wrong = worst[2]
    press(opened, "ENTER")
    reads("improvement", 2, wrong.argmax() if wrong.any() else 2)
    opened.find_element("css selector", "[name=arm][value='0']").click()
    press(opened, "ARROW_RIGHT")  # moves on to the next arm, not in the matrix
    reads("improvement", 2, wrong.argmax() if wrong.any() else 2)
    opened.find_element("css selector", "[name=arm][value='0']").click()
    opened.execute_script(
        "const c = document.querySelector('#matrix'), r = c.getBoundingClientRect(), k = c.clientWidth / 12;"
        "c.dispatchEvent(new PointerEvent('pointermove', {clientX: r.x + c.clientLeft + 7.5 * k,"
        "clientY: r.y + c.clientTop + 3.5 * k}))"
    )
    reads("baseline", 3, 7)
    assert ask(opened, "document.querySelector('#matrix-says').getAttribute('role')") == "status"


def test_browser_draws_right_and_wrong_cells(opened, whole):
    data = read_data(whole.page)
    counts_KK = confusion(whole.frames["improvement"], 12)[np.ix_(data["order"], data["order"])]
    pixels = ask(
        opened,
        "(() => { const c = document.querySelector('#matrix'), n = c.width;"
        "const { data } = c.getContext('2d').getImageData(0, 0, n, n);"
        "const middle = i => Math.floor((i + 0.5) * n / 12);"
        "return [...Array(144).keys()].map(i => {"
        "const start = 4 * (middle(Math.floor(i / 12)) * n + middle(i % 12));"
        "return [...data.slice(start, start + 4)]; }); })()",
    )
    for count, on_diagonal, (red, _, blue, alpha) in zip(
        counts_KK.ravel(), np.eye(12, dtype=bool).ravel(), pixels, strict=True
    ):
        assert (alpha > 0) == (count > 0) and (not count or (blue > red) == on_diagonal)


def test_browser_reads_charts_out(opened):
    for number in range(len(texts(opened, ".chart"))):
        marks = ask(
            opened,
            "[...document.querySelectorAll('.chart')[arguments[0]].querySelectorAll('.mark')]"
            ".map(m => m.getAttribute('aria-label'))",
            number,
        )
        opened.execute_script(
            "document.querySelectorAll('.chart')[arguments[0]].querySelector('.mark').focus()", number
        )
        read_out = f"document.querySelectorAll('.chart')[{number}].querySelector('.readout').textContent"
        assert ask(opened, read_out) == marks[0]
        press(opened, "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "ARROW_RIGHT")
        assert ask(opened, read_out) == marks[2]
        assert ask(opened, "document.activeElement.tabIndex") == 0
        press(opened, "ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT")
        assert ask(opened, read_out) == marks[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_has_no_sideways_scroll_on_a_phone(opened, scheme):
    emulate(opened, 360, prefers_color_scheme=scheme)
    assert ask(opened, "document.documentElement.scrollWidth <= 360 && innerWidth === 360")
    background = ask(opened, "getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 26)"}[scheme]


def test_browser_shows_focus_and_moves_only_if_wanted(opened):
    stops = "[...document.querySelectorAll('a, button, input, select, [tabindex=\"0\"]')]"
    opened.execute_script(f"{stops}.forEach(e => {{ e.dataset.seen = '' }})")
    for _ in range(14):
        press(opened, "TAB")
        style = ask(
            opened,
            "(() => { const e = document.activeElement, s = getComputedStyle(e.querySelector('rect') ?? e);"
            "return s.outlineStyle + s.outlineWidth + s.strokeWidth; })()",
        )
        assert "solid3px" in style or "2px" in style
    assert ask(opened, "getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    emulate(opened, 1280, prefers_reduced_motion="no-preference")
    assert ask(opened, "getComputedStyle(document.documentElement).scrollBehavior") == "smooth"


def test_a_page_of_other_results_is_named(whole, tmp_path):
    results = shutil.copytree(whole.results, tmp_path / "results")
    assert check.derived(tmp_path) == []
    path = results / "Best" / "metrics.json"
    write_json(path, read_json(path) | {"seed": 17})
    assert check.derived(tmp_path) == ["results/report.html: is not of these results; run `make report`"]
