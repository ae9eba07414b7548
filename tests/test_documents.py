"""The paper and the slides say what results/ holds, follow its changes, and stop when it is not there."""

import functools
import json
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
import yaml
from pypdf import PdfReader

from src import SetupError
from tools import documents

ROOT = Path(__file__).resolve().parent.parent
PAPER, SLIDES, SALINDIA = (document for group in documents.DOCUMENTS.values() for document in group)


def copy_of(root: Path, to: Path) -> Path:
    """The texts and what they read, with the prediction files, as a repository of its own."""
    names = [path for pattern in documents.TEXTS for path in root.glob(pattern)] + list(
        documents.needed(root)
    )
    names += root.glob("results/*/*_validation_predictions.csv")
    names += root.glob("results/ablation/*")
    for path in names:
        (to / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / path.relative_to(root))
    subprocess.run(["git", "init", "--quiet", str(to)], check=True)
    return to


@pytest.fixture
def tree(tmp_path) -> Path:
    """Committed texts and results, to be changed."""
    return copy_of(ROOT, tmp_path / "tree")


@pytest.fixture(scope="module")
def made() -> dict:
    """Document -> its PDF from the committed results."""
    return {document: documents.compiled(document, ROOT) for document in (PAPER, SLIDES, SALINDIA)}


@functools.cache
def words(pdf: bytes, n_pages: int | None = None) -> str:
    """The text of the first pages (all by default), on one line."""
    pages = "\n".join(page.extract_text() for page in PdfReader(BytesIO(pdf)).pages[:n_pages])
    return re.sub(r"\s+", " ", pages.replace("\u200b", ""))


def abstract(root: Path) -> str:
    """The first page of the paper, compiled anew."""
    return words(documents.compiled(PAPER, root), n_pages=1)


def metrics(arm: str, root: Path = ROOT) -> dict:
    return json.loads((root / "results" / arm.capitalize() / "metrics.json").read_text(encoding="utf-8"))


def change(path: Path, **values) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | values), encoding="utf-8")


@pytest.mark.parametrize("arm", documents.ARMS)
def test_every_document_says_each_arms_accuracy_and_interval(made, arm):
    found = metrics(arm)
    accuracy = f"{100 * found['accuracy']:.2f} %"
    interval = f"[{100 * found['wilson_low']:.2f}, {100 * found['wilson_high']:.2f}]"
    for document in (PAPER, SLIDES):
        assert accuracy in words(made[document]) and interval in words(made[document])
    indonesian = interval.replace(", ", "; ").replace(".", ",")
    assert accuracy.replace(".", ",") in words(made[SALINDIA]) and indonesian in words(made[SALINDIA])


def test_the_papers_difference_is_that_of_the_comparison(made):
    found = json.loads((ROOT / "results" / "comparison.json").read_text(encoding="utf-8"))
    low, high = (
        f"{100 * found[key]:+.2f}".replace("-", "−") for key in ("difference_low", "difference_high")
    )
    said = f"{100 * found['difference']:+.2f} points".replace("-", "−")
    assert said in words(made[PAPER]) and f"[{low}, {high}]" in words(made[PAPER])


def test_the_paper_has_every_row_of_the_ablation(made):
    table = pd.read_csv(ROOT / "results" / "ablation" / "summary.csv")
    text = words(made[PAPER])
    missing = [row.row for row in table.itertuples() if f"{row.row} {100 * row.valid_mean:.2f}" not in text]
    assert not missing


def test_the_studys_intervals_are_those_of_its_counts(made):
    """By statsmodels, which the document knows nothing of."""
    from statsmodels.stats.proportion import proportion_confint

    study = json.loads((ROOT / "results" / "study.json").read_text(encoding="utf-8"))
    for arm in ("baseline", "improvement"):
        n_correct, n = study[arm]["n_correct"]["value"], study[arm]["n"]["value"]
        low, high = proportion_confint(n_correct, n, method="wilson")
        assert f"[{100 * low:.2f}, {100 * high:.2f}]" in words(made[PAPER])


def test_a_changed_number_changes_the_documents(tree):
    change(tree / "results/Baseline/metrics.json", accuracy=0.12345)
    assert f"from {100 * metrics('baseline')['accuracy']:.2f} % to" not in (text := abstract(tree))
    assert "from 12.35 % to" in text


def test_a_changed_sign_changes_the_sentences(tree):
    """A loss is not called a gain, in the paper or in the slides."""
    comparison = tree / "results/comparison.json"
    said = {}
    for name, low, high in (
        ("raises", 0.01, 0.03),
        ("lowers", -0.03, -0.01),
        ("cannot be told apart", -0.01, 0.01),
    ):
        change(comparison, difference=(low + high) / 2, difference_low=low, difference_high=high)
        said[name] = abstract(tree)
        assert f"recipe {name}" in said[name]
    assert "lowers accuracy" not in said["raises"] and "raises accuracy" not in said["lowers"]


@pytest.mark.parametrize(
    ("add", "remove", "said"),
    [
        ("helps", "hurts", "feature map helps."),
        ("hurts", "helps", "feature map hurts."),
        ("cannot be told apart from noise", "changes nothing", "feature map did not help:"),
        ("helps", "helps", "helps in one place of the recipe and hurts in another"),
        ("one seed: not judged", "one seed: not judged", "did not help in the one seed that was run"),
    ],
)
def test_what_is_said_of_attention_follows_from_its_two_rows(tree, add, remove, said):
    path = tree / "results/ablation/summary.csv"
    table = pd.read_csv(path)
    table = table[~table["row"].isin(("+ spatial attention", "recipe, without attention"))]
    line = table.iloc[-1]
    rows = [
        {**line, "row": "+ spatial attention", "verdict": add, "difference": -0.01},
        {**line, "row": "recipe, without attention", "verdict": remove, "difference": 0.01},
    ]
    pd.concat([table, pd.DataFrame(rows)]).to_csv(path, index=False)
    assert said in abstract(tree)


REGULARISERS = ("RandAugment", "erasing", "dropout", "weight decay", "label smoothing")


def unbroken(text: str) -> str:
    """Without spaces and hyphens: a line may break, and a word part, anywhere."""
    return re.sub(r"[\s-]", "", text)


def judge(tree: Path, **verdicts: str) -> str:
    """The paper's conclusion where fine-tuning and the regularisers' rows have these verdicts, else noise.

    A regulariser that helps where it is added hurts where it is taken away, and the other way round.
    """
    opposite = {"helps": "hurts", "hurts": "helps"}
    said = {"trained: head alone": verdicts.pop("alone", "hurts")}
    said["+ full fine-tuning"] = verdicts.pop("tuning")
    for name in REGULARISERS:
        own = verdicts.get(name.replace(" ", "_"), "cannot be told apart from noise")
        added = f"+ {name} (recipe)" if name == "label smoothing" else f"+ {name}"
        said |= {added: own, f"recipe, without {name}": opposite.get(own, own)}
    path = tree / "results/ablation/summary.csv"
    table = pd.read_csv(path)
    assert set(said) <= set(table["row"])
    table["verdict"] = table["row"].map(said).fillna(table["verdict"])
    table.to_csv(path, index=False)
    return unbroken(words(documents.compiled(PAPER, tree))).partition("Thestudy’sadvice")[2]


def test_the_study_s_advice_is_judged_by_its_rows(tree):
    every = {name.replace(" ", "_"): "helps" for name in REGULARISERS}
    text = judge(tree, tuning="hurts", **every)
    assert text.startswith(unbroken("to fine-tune is not borne out: it costs accuracy ("))
    assert unbroken("Its advice to regularise is borne out by the ablation") in text
    assert unbroken(": RandAugment, random erasing, dropout, weight decay and label smoothing help (") in text
    text = judge(tree, tuning="helps", RandAugment="helps", erasing="hurts")
    assert text.startswith(unbroken("to fine-tune is borne out (")) and "doesbetter" not in text
    assert unbroken("Its advice to regularise is borne out in part by the ablation") in text
    shares = (
        "RandAugment helps; random erasing hurts; dropout, weight decay and label smoothing cannot be told"
    )
    assert unbroken(shares) in text
    text = judge(tree, tuning="helps", alone="helps")
    assert unbroken("training the head alone does better (") in text
    assert unbroken("Its advice to regularise is not borne out by the ablation") in text


def test_the_largest_gains_are_single_steps(made):
    table = pd.read_csv(ROOT / "results" / "ablation" / "summary.csv")
    table = table[(table["verdict"] == "helps") & ~table["row"].isin(["improvement as run", "best"])]
    said = re.search(r"The largest gains are (.*?)\. The largest", words(made[PAPER]))[1]
    for row in table.nlargest(3, "difference").itertuples():
        name = row.row.replace("'", "’")
        assert f"{name} (+{100 * row.difference:.2f}" in said.replace("'", "’")
    assert said.count("[") == 3


def test_what_is_said_of_the_marks_follows_from_each_arm_s(tree):
    path = tree / "results/explain/explain.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    for arm, low, high in (("baseline", 0.02, 0.04), ("improvement", -0.02, 0.04)):
        found[arm]["grad_cam"] |= {"difference": 0.03, "difference_low": low, "difference_high": high}
    path.write_text(json.dumps(found), encoding="utf-8")
    text = unbroken(words(documents.compiled(PAPER, tree)))
    assert "[−2.0,+4.0],soitsmarkscannotbetoldapartfromrandomones.Forthebaseline" in text
    assert "[+2.0,+4.0]:its" in text and text.count("meansomething") == 1
    text = words(documents.compiled(SLIDES, tree))
    assert "The improvement’s marks cannot be told from random ones:" in text
    assert "the baseline’s (+3.0 [+2.0, +4.0]) mean something." in text


def test_every_text_says_that_the_best_recipe_has_seen_the_valid_images(made):
    said = "optimistic by an unknown, probably small amount"
    assert words(made[PAPER], n_pages=1).count(said) == 1 and words(made[PAPER]).count(said) == 3
    assert said in words(made[SLIDES]) and "agak terlalu baik" in words(made[SALINDIA])
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_paper_says_which_network_was_run(tree):
    """The title is ConvNeXt's only where ConvNeXt was measured; sizes follow."""
    for backbone, size, title, tokens in (
        ("tf_efficientnet_lite0.in1k", 96, "Fine-Tuning for Tiny-ImageNet", "3 × 3 positions"),
        ("convnext_tiny.fb_in1k", 224, "Optimizing ConvNeXt for Tiny-ImageNet", "7 × 7 positions"),
    ):
        for arm in documents.ARMS:
            change(tree / f"results/{arm.capitalize()}/metrics.json", backbone=backbone, image_size=size)
        text = words(documents.compiled(PAPER, tree), n_pages=2)
        assert title in text and tokens in text and f"at {size} px" in text
        assert ("has not been run" in text) == (size == 96)


def test_the_same_files_give_the_same_bytes(made, tree):
    for document in (PAPER, SALINDIA):
        assert documents.compiled(document, tree) == made[document]


def test_a_missing_result_is_named_with_its_command(tree, capsys):
    (tree / "results/explain/explain.json").unlink()
    assert documents.main(["paper"], tree) == 2
    error = capsys.readouterr().err
    assert "results/explain/explain.json is missing; run `python -m src.experiment explain`" in error
    assert not (tree / PAPER.pdf).exists()


def test_stale_results_are_named_with_their_commands(tree):
    changes = {
        "comparison.json": ({"difference": 0.5}, "improvement"),
        "Best/metrics.json": ({"accuracy": 0.5}, "best"),
        "analysis/analysis.json": ({"source_sha256": {"baseline": "", "improvement": ""}}, "analysis"),
        "data/audit.json": ({"data_fingerprint": "another"}, "audit"),
    }
    for name, (values, _) in changes.items():
        change(tree / "results" / name, **values)
    summary = tree / "results/ablation/summary.csv"
    summary.write_text(summary.read_text(encoding="utf-8").replace("helps", "hurts"), encoding="utf-8")
    with pytest.raises(SetupError) as raised:
        documents.require_results(tree)
    for name, (_, command) in changes.items():
        assert re.search(rf"results/{name}: .*run `python -m src.experiment {command}`", str(raised.value))
    assert "results/ablation/summary.csv" in str(raised.value)


def test_documents_are_written_and_known_to_be_of_these_results(tree, capsys):
    assert documents.main([], tree) == 0, capsys.readouterr().err
    assert documents.outdated(tree) == []
    change(tree / "results/explain/explain.json", share_deleted=0.5)
    assert len(documents.outdated(tree)) == 3


def test_a_fault_in_the_text_is_one_message(tree, capsys, monkeypatch):
    monkeypatch.setattr(documents, "require_results", lambda root: None)
    (tree / PAPER.source).write_text("#nothing-of-this-name", encoding="utf-8")
    assert documents.main(["paper"], tree) == 2
    assert "paper/Final_Paper.typ" in capsys.readouterr().err


def test_no_accuracy_is_typed_by_hand():
    texts = [*ROOT.glob("paper/*.typ"), *ROOT.glob("presentation/*.typ")]
    typed = {
        path.name: re.findall(r"\d\d[.,]\d+\s*(?:%|points|poin)", path.read_text(encoding="utf-8"))
        for path in texts
    }
    assert len(texts) == 6 and not any(typed.values()), typed


def test_both_languages_have_the_same_texts():
    names = [
        set(
            re.findall(
                r"^#let ([\w-]+)", (ROOT / f"presentation/{lang}.typ").read_text(encoding="utf-8"), re.M
            )
        )
        for lang in ("en", "id")
    ]
    assert names[0] | {"row-words"} == names[1]


def test_every_reference_is_cited_and_can_be_found():
    entries = re.split(r"^@\w+\{", (ROOT / "paper/references.bib").read_text(encoding="utf-8"), flags=re.M)[
        1:
    ]
    text = (ROOT / PAPER.source).read_text(encoding="utf-8")
    for entry in entries:
        key = entry.split(",")[0]
        assert f"@{key}" in text, key
        assert re.search(r"doi +=|url +=|publisher +=", entry), key


def test_the_studys_authors_are_those_of_the_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    people = [f"{p['family-names']}, {p['given-names']}" for p in citation["references"][0]["authors"]]
    assert " and ".join(people) in (ROOT / "paper/references.bib").read_text(encoding="utf-8")


@pytest.mark.parametrize("arm", ["baseline", "improvement"])
def test_the_studys_numbers_agree_with_each_other(arm):
    study = json.loads((ROOT / "results" / "study.json").read_text(encoding="utf-8"))
    quantities = study[arm]
    assert {quantity["source"] for quantity in quantities.values()} <= set(study["sources"])
    value = {name: quantity["value"] for name, quantity in quantities.items()}
    chosen = value["log"][value["best_epoch"] - 1]
    for name in ("train_accuracy", "valid_accuracy", "valid_loss"):
        assert chosen[name] == value[name]
    assert len(value["log"]) == value["epochs"]
    assert value["n_correct"] / value["n"] == pytest.approx(value["valid_accuracy"], abs=2e-4)
    best = max(range(value["epochs"]), key=lambda i: value["log"][i]["valid_accuracy"])
    assert best + 1 == value["best_epoch"]
