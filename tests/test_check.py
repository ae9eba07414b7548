"""Each check of `make check` passes on a sound miniature repository and fails on the one fault it is for."""

import json
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_ablation import made_up

from src.config import CHOICES
from src.evaluate import compare, score
from src.report import write_csv
from src.studies import ABLATION
from src.studies.table import about, read_table, write_words
from tools import check, readme, torture

ROOT = Path(__file__).resolve().parents[1]
URL = "https://github.com/someone/thing"
BADGE = "[badge](https://colab.research.google.com/github/someone/thing/blob/main/notebook/N.ipynb)"
README = f"""# Thing
`make quick`, or `python -m src.model`, writes `results/quick/Baseline/`; see `src/model.py`, `*.ipynb`,
[the licence](LICENSE) and `results/<Arm>/metrics.json`. The hub has `someone/tiny-imagenet`.

```
git clone {URL}.git
```
<!-- results:begin -->
<!-- results:end -->
<!-- audit:begin -->
<!-- audit:end -->
<!-- ablation:begin -->
<!-- ablation:end -->
<!-- pretrain:begin -->
<!-- pretrain:end -->
<!-- transfer40:begin -->
<!-- transfer40:end -->
<!-- animals40:begin -->
<!-- animals40:end -->
<!-- dogs20:begin -->
<!-- dogs20:end -->
<!-- fine_grained:begin -->
<!-- fine_grained:end -->
<!-- speed:begin -->
<!-- speed:end -->
<!-- reliability:begin -->
<!-- reliability:end -->
"""
NOT_RUN = "not run yet: `python -m src.experiment ablation --profile offline --data DIR`"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A sound miniature repository with one notebook and one arm's results."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    files = {
        "Makefile": "".join(
            f"{target}:  ## do\n\techo\n" for target in ("quick", "bench", "ablation", "audit", "torture")
        ),
        "LICENSE": "MIT\n",
        "CITATION.cff": f'repository-code: "{URL}"\n',
        "src/__init__.py": "",
        "src/model.py": "X = 1\n",
        "src/experiment.py": "",
        "README.md": README,
        "results/study.json": (ROOT / "results" / "study.json").read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        write(tmp_path / name, text)
    write_notebook(tmp_path, sound_cells())
    frame = pd.DataFrame(
        {"Index": range(6), "Ground_Truth": [0, 0, 1, 1, 2, 2], "Prediction": [0, 1, 1, 1, 2, 0]}
    )
    frame["Is_Correct"] = frame["Ground_Truth"] == frame["Prediction"]
    folder = tmp_path / "results" / "Baseline"
    folder.mkdir(parents=True)
    frame.to_csv(folder / "baseline_validation_predictions.csv", index=False)
    metrics = {"arm": "baseline", "backbone": "b", "image_size": 96, "data": "d", "protocol": "holdout"}
    metrics |= {"epochs": 2, "best_epoch": 1, "hardware": "cpu", "seconds": {"total": 60}}
    metrics |= {"config": {"model": {"trainable": "none"}}}
    write(folder / "metrics.json", json.dumps({**metrics, **score(frame)}, default=str))
    write(tmp_path / torture.TABLE, torture.gathered(torture_records()).to_csv(index=False))
    write(tmp_path / "README.md", readme.rewritten(README, tmp_path))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def sound_cells() -> list:
    return [
        new_markdown_cell(BADGE),
        new_code_cell(f'REPO_URL = "{URL}"'),
        new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
    ]


def write_notebook(repo: Path, cells: list, name: str = "notebook/N.ipynb") -> None:
    (repo / name).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), repo / name)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_sound_repository_passes(repo, capsys):
    assert check.main(repo) == 0, capsys.readouterr().out


def test_a_failure_is_counted_and_printed(repo, capsys):
    edit(repo / "README.md", "`src/model.py`", "`src/modle.py`")
    assert check.main(repo) == 1
    assert "README.md names `src/modle.py`" in capsys.readouterr().out


@pytest.mark.parametrize("code", ["import os\nX = 1\n", "X  =  1\n"], ids=["rule", "format"])
def test_lint(repo, code):
    write(repo / "src/model.py", code)
    assert check.lint(repo)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cells: cells[2].outputs.append(new_output("stream", text="x")), "outputs"),
        (lambda cells: cells[2].update(execution_count=3), "outputs"),
        (lambda cells: cells.extend(new_code_cell("x") for _ in range(11)), "13 code cells"),
        (lambda cells: cells.append(new_code_cell("x = 1\n" * 59)), "61 code lines"),
        (lambda cells: cells.append(new_code_cell("def f():\n    pass")), "belongs in src"),
        (lambda cells: cells.append(new_code_cell("for epoch in range(3):\n    pass")), "belongs in src"),
        (lambda cells: cells.pop(1), "bootstrap"),
        (lambda cells: cells[2].metadata.update(tags=[]), "parameters"),
        (lambda cells: cells[0].update(source="# no badge"), "badge"),
    ],
)
def test_notebooks(repo, change, said):
    cells = sound_cells()
    change(cells)
    write_notebook(repo, cells)
    problems = check.notebooks(repo)
    assert any(said in problem for problem in problems), problems


def test_the_limits_of_a_thin_notebook_are_inclusive(repo):
    write_notebook(repo, [*sound_cells(), new_code_cell("# why\n\n" + "x = 1\n" * 58)])
    assert check.notebooks(repo) == []


@pytest.mark.parametrize(
    "output",
    [
        new_output("error", ename="E", evalue="", traceback=[]),
        new_output("stream", text="saved to /home/somebody/thing"),
    ],
)
def test_executed_copies(repo, output):
    name = "results/Baseline/N.ipynb"
    write_notebook(repo, [new_code_cell("x", outputs=[new_output("stream", text="results/Baseline")])], name)
    assert check.executed_copies(repo) == []
    write_notebook(repo, [new_code_cell("x", outputs=[output])], name)
    assert len(check.executed_copies(repo)) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("`src/model.py`", "`src/gone.py`"),
        ("`src/model.py`", "`gone.md`"),
        ("`src/model.py`", "`srcs/`"),
        ("`*.ipynb`", "`*.csvs.png`"),
        ("](LICENSE)", "](LICENCE)"),
        ("`results/<Arm>/metrics.json`", "`results/<Arm>/metric.json`"),
        ("python -m src.model", "python -m src.models"),
        ("`make quick`", "`make quickly`"),
    ],
)
def test_readme_names(repo, old, new):
    assert check.readme_names(repo) == []
    edit(repo / "README.md", old, new)
    assert len(check.readme_names(repo)) == 1


def test_readme_numbers_and_the_command_that_mends_them(repo):
    edit(repo / "README.md", "**66.67 %**", "**66.76 %**")
    assert check.readme_numbers(repo)
    text = (repo / "README.md").read_text(encoding="utf-8")
    write(repo / "README.md", readme.rewritten(text, repo))
    assert check.readme_numbers(repo) == []


def test_readme_without_markers(repo):
    edit(repo / "README.md", "<!-- speed:end -->", "")
    assert "markers" in check.readme_numbers(repo)[0]


def test_results(repo):
    path = repo / "results/Baseline/metrics.json"
    edit(path, '"accuracy": 0.66', '"accuracy": 0.67')
    assert len(check.results(repo)) == 1 and "accuracy" in check.results(repo)[0]


def test_results_of_another_prediction_file(repo):
    path = repo / "results/Baseline/baseline_validation_predictions.csv"
    edit(path, "5,2,0,False", "5,2,2,True")
    said = " ".join(check.results(repo))
    assert "accuracy" in said and "n_correct" in said


def test_results_without_predictions(repo):
    (repo / "results/Baseline/baseline_validation_predictions.csv").unlink()
    assert check.results(repo)


def test_comparison(repo):
    folder = repo / "results"
    (folder / "Improvement").mkdir()
    frame = pd.read_csv(folder / "Baseline/baseline_validation_predictions.csv")
    frame.loc[1, ["Prediction", "Is_Correct"]] = [0, True]
    frame.to_csv(folder / "Improvement/improvement_validation_predictions.csv", index=False)
    frames = [pd.read_csv(path) for path in sorted(folder.glob("*/*predictions.csv"))]
    write(folder / "comparison.json", json.dumps(compare(*frames)))
    assert check.results(repo) == []
    edit(folder / "comparison.json", '"only_b_correct": 1', '"only_b_correct": 2')
    assert check.results(repo) == ["results/comparison.json: only_b_correct is 2, the predictions give 1"]


@pytest.fixture
def ablated(repo) -> Path:
    """The sound repository with an ablation, its summary and its table in the README."""
    folder = repo / "results" / "ablation"
    folder.mkdir()
    write_csv(made_up(), folder / "ablation.csv", inert=False)
    write_words(ABLATION, folder, read_table(ABLATION, folder))
    write(repo / "README.md", readme.rewritten((repo / "README.md").read_text(encoding="utf-8"), repo))
    return folder


def test_a_sound_ablation_passes(ablated, repo, capsys):
    assert check.main(repo) == 0, capsys.readouterr().out
    assert NOT_RUN not in (repo / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["summary.csv", "summary.md"])
@pytest.mark.parametrize("fault", ["edited", "missing"])
def test_an_ablation_s_summary_is_that_of_its_rows(ablated, repo, name, fault):
    assert check.studies(repo) == []
    if fault == "missing":
        (ablated / name).unlink()
    else:
        edit(ablated / name, "cannot be told apart from noise", "helps")
    failures = check.studies(repo)
    assert len(failures) == 1 and failures[0].startswith(f"results/ablation/{name}: ")
    assert "run `make readme`" in failures[0]


def test_an_ablation_with_other_rows_than_its_summary(ablated, repo):
    table = read_table(ABLATION, ablated)
    table.loc[5, "valid_accuracy"] += 0.001
    write_csv(table, ablated / "ablation.csv", inert=False)
    assert len(check.studies(repo)) == 2
    write_csv(table[:0], ablated / "ablation.csv", inert=False)
    [failure] = check.studies(repo)
    assert failure == "results/ablation/ablation.csv: has no rows; run `python -m src.experiment ablation`"


def test_a_damaged_ablation_is_a_failure_not_a_crash(ablated, repo, capsys):
    write_csv(read_table(ABLATION, ablated).drop(columns="valid_loss"), ablated / "ablation.csv", inert=False)
    assert check.main(repo) == 1
    assert "could not be checked: 'valid_loss'" in capsys.readouterr().out


def test_the_remedy_mends_summary_and_readme(ablated, repo, monkeypatch):
    table = read_table(ABLATION, ablated)
    table.loc[5, "valid_accuracy"] += 0.1
    write_csv(table, ablated / "ablation.csv", inert=False)
    monkeypatch.delitem(readme.PAGES, "bench/README.md")
    before = (repo / "README.md").read_text(encoding="utf-8")
    assert check.studies(repo)
    assert readme.main(repo) == 0
    assert check.studies(repo) == check.readme_numbers(repo) == []
    assert (repo / "README.md").read_text(encoding="utf-8") != before
    assert (ablated / "ablation.png").exists()


def test_the_readme_s_ablation_has_a_line_a_row(ablated, repo):
    shared, _, *lines = readme.study(ABLATION, repo).splitlines()
    assert shared == f"{about(ABLATION, read_table(ABLATION, ablated))}." and " px · " in shared
    assert lines[0] == "| row | valid | ECE | difference | verdict |"
    names = [row.name for row in ABLATION.rows]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == names
    edit(repo / "README.md", lines[4], lines[5])
    assert check.readme_numbers(repo)


def test_an_ablation_that_has_not_run_says_how_to(repo):
    assert readme.study(ABLATION, repo) == NOT_RUN
    assert "<!-- ablation:begin -->\nnot run yet" in (repo / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("trainable", "said"),
    [
        ("none", "(frozen)"),
        ("last_stage", "(last stage trained)"),
        ("last_two_blocks", "(last two blocks trained)"),
        ("all", "(all layers trained)"),
    ],
)
def test_the_readme_names_what_was_trained(repo, trainable, said):
    assert trainable in CHOICES["model.trainable"]
    edit(repo / "results/Baseline/metrics.json", '"trainable": "none"', f'"trainable": "{trainable}"')
    assert f"`b` {said} | 96 px |" in readme.results(repo)


def test_the_readme_names_every_part_that_can_be_trained():
    assert readme.TRAINED.keys() == set(CHOICES["model.trainable"])


def test_the_readme_says_where_prediction_is_larger(repo):
    path = repo / "results/Baseline/metrics.json"
    edit(path, '"image_size": 96', '"image_size": 96, "test_size": 96')
    assert "| 96 px |" in readme.results(repo)
    edit(path, '"test_size": 96', '"test_size": 128')
    assert "| 96 px, tested at 128 px |" in readme.results(repo)


def test_the_readme_shows_the_best_arm_where_there_is_one(repo):
    assert "Best" not in readme.results(repo)
    text = (repo / "results/Baseline/metrics.json").read_text(encoding="utf-8")
    write(repo / "results/Best/metrics.json", text.replace('"arm": "baseline"', '"arm": "best"'))
    lines = readme.results(repo).splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| **Baseline, here**", "| **Best, here**"]


def test_the_readme_says_what_the_pretraining_reached(repo):
    assert "not run yet" in readme.pretraining(repo)
    of_baseline = json.loads((repo / "results/Baseline/metrics.json").read_text(encoding="utf-8"))
    more = {"holdout_accuracy": 0.125, "n_holdout": 5000}
    write(repo / "results/Pretrain/metrics.json", json.dumps(of_baseline | more))
    said = readme.pretraining(repo)
    assert said.startswith("**66.67 %** [30.00, 90.32] of `valid`, 12.50 % of `holdout` (5,000 images); `b`")
    assert said.endswith("96 px, best 1 of 2 epochs, cpu, 1.0 min.")


def test_the_readme_says_what_the_study_reports(repo):
    """Where its files say more than its slides, both; intervals as statsmodels has them."""
    table = readme.results(repo)
    assert "| Baseline, reported by the study | 82.61 % [81.85, 83.34] | `convnext_tiny.in12k" in table
    assert (
        "| 86.30 % (86.31 % by row [85.62, 86.97]) | `convnext_tiny.fb_in1k` (last stage trained) |" in table
    )


@pytest.mark.parametrize("name", ["analysis", "explain"])
def test_what_was_made_of_other_predictions_is_named(repo, name):
    assert check.derived(repo) == []
    write(repo / f"results/{name}/{name}.json", json.dumps({"source_sha256": {"baseline": "0" * 64}}))
    assert "other predictions" in (failure := check.derived(repo)[0])
    assert f"results/{name}/{name}.json" in failure and f"src.experiment {name}`" in failure


def test_an_audit_of_other_predictions_is_named(repo):
    arms = {"Baseline": {"all": {"n_correct": 4}}}
    write(repo / "results/data/audit.json", json.dumps({"arms": arms}))
    assert check.derived(repo) == []
    edit(repo / "results/data/audit.json", "4", "5")
    assert "results/data/audit.json: is of other predictions than Baseline's" in check.derived(repo)[0]


def test_sizes(repo, monkeypatch):
    (repo / "big.bin").write_bytes(bytes(1_000_001))
    assert len(check.sizes(repo)) == 1
    monkeypatch.setitem(check.LARGE_FILES, "big.bin", "a reason")
    assert check.sizes(repo) == []
    (repo / "big.bin").write_bytes(bytes(10_000_001))
    assert len(check.sizes(repo)) == 1


def test_ignored_files_may_be_large(repo):
    write(repo / ".gitignore", "big.bin\n")
    (repo / "big.bin").write_bytes(bytes(1_000_001))
    assert check.sizes(repo) == []


@pytest.mark.parametrize("name", ["a-0.0.0-py3-none-any.whl", "data/Photos.ZIP", "a.tar.gz"])
def test_archives(repo, name):
    assert check.archives(repo) == []
    write(repo / name, "")
    assert len(found := check.archives(repo)) == 1 and name in found[0]
    write(repo / ".gitignore", f"{name}\n")
    assert check.archives(repo) == []  # on the disk alone it is nobody's trouble
    subprocess.run(["git", "-C", str(repo), "add", "--force", name], check=True)
    assert len(check.archives(repo)) == 1


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff", "notebook/N.ipynb"])
def test_repo_url(repo, name):
    assert check.repo_url(repo) == []
    edit(repo / name, "someone/thing", "someone/other")
    assert len(check.repo_url(repo)) == 1


def torture_records(**changed: tuple[int, int]) -> list[dict]:
    """Every fault as often as promised, but for `changed`: tried and survived."""
    rows = {name: (figure, figure) for name, (_, _, figure) in torture.FAULTS.items()} | changed
    return [{"name": name, "tried": tried, "survived": n} for name, (tried, n) in rows.items()]


def test_the_reliability_table_is_replaced_row_by_row():
    """What ran takes the place of what was there; other faults keep their rows, in the list's order."""
    names = list(torture.FAULTS)
    first = torture.gathered([{"name": names[2], "tried": 3000, "survived": 3000}])
    both = [{"name": names[0], "tried": tried, "survived": tried} for tried in (4, 500)]
    table = torture.updated(torture.updated(first, first), torture.gathered(both))
    assert table["fault"].tolist() == [torture.FAULTS[names[i]][0] for i in (0, 2)]
    assert table[["tried", "survived"]].to_numpy().tolist() == [[504, 504], [3000, 3000]]


def test_too_few_attempts_replace_no_row():
    """Not even where some of them failed: pytest says so, and the table is of whole runs."""
    fault, _, figure = torture.FAULTS["kill"]
    before = torture.gathered(torture_records(kill=(figure + 5, figure + 5)))
    for few in ((0, 0), (figure - 1, figure - 1), (figure - 1, 0)):
        assert torture.updated(before, torture.gathered(torture_records(kill=few))).equals(before)
    now = torture.gathered(torture_records(kill=(figure, figure - 2)))
    row = torture.updated(before, now).set_index("fault").loc[fault]
    assert (row["tried"], row["survived"]) == (figure, figure - 2)


def test_reliability_is_checked_against_what_is_promised(repo):
    fault, promise, figure = torture.FAULTS["two_runs"]
    for changed, failures in (
        ((figure, figure), []),
        ((figure - 1, figure - 1), [f"{fault}: {figure - 1} attempts, {figure} are promised"]),
        ((figure, figure - 2), [f"{fault}: {figure - 2} of {figure} survived"]),
    ):
        table = torture.gathered(torture_records(two_runs=changed))
        write(repo / torture.TABLE, table.to_csv(index=False))
        assert check.reliability(repo) == failures
        assert f"| {promise} | {changed[0]} | {changed[1]} |" in readme.reliability(repo)
    write(repo / torture.TABLE, table[table["fault"] != fault].to_csv(index=False))
    assert check.reliability(repo) == [f"{fault}: never tried, {figure} attempts are promised"]


@pytest.mark.parametrize(
    ("arguments", "changed", "pytest_status", "status", "said"),
    [
        ([], {}, 0, 0, ""),
        (["-k", "drive"], {"kill": None}, 0, 0, ""),  # not asked for
        ([], {"kill": None}, 0, 1, "never tried, 220 attempts are promised"),
        (["-k", "kill"], {"kill": (3, 3)}, 0, 1, "left out of results/reliability.csv: kill -9 at any"),
        ([], {"drive": (50, 49)}, 1, 1, "pytest failed: its exit status is 1"),
        ([], {}, 3, 3, "pytest failed: its exit status is 3"),
    ],
)
def test_torture_fails_where_too_little_ran(
    arguments, changed, pytest_status, status, said, tmp_path, monkeypatch, capsys
):
    def run(command, cwd, env):
        records = torture_records(**{name: tried for name, tried in changed.items() if tried})
        for record in (record for record in records if changed.get(record["name"], ()) is not None):
            write(Path(env["TORTURE_RECORDS"]) / f"{record['name']}.json", json.dumps(record))
        return subprocess.CompletedProcess(command, pytest_status)

    monkeypatch.setattr(torture, "ROOT", tmp_path)
    monkeypatch.setattr(torture.subprocess, "run", run)
    assert torture.main(arguments) == status
    assert said in capsys.readouterr().out
    kept = torture.read(tmp_path / torture.TABLE)["fault"].tolist()
    assert (torture.FAULTS["kill"][0] in kept) == ("kill" not in changed)
