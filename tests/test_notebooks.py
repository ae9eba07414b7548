"""The notebooks' structure, the bootstrap behind their first cell, and what they display."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from statsmodels.stats.proportion import proportion_confint
from torch import nn

from src import SetupError, bootstrap, notebook
from tools import check, execute

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebook").glob("*.ipynb")) + sorted((ROOT / "notebook").glob("*/*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def cells(path: Path) -> dict:
    return {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}


# The notebook files


def test_the_notebooks_are_there():
    studies = ["Animals40", "DogBreeds20", "FineGrained"]
    assert ["ConvNeXt_Baseline", "ConvNeXt_Improvement", *studies] == NAMES
    assert {ROOT / "notebook" / source for source, _ in execute.NOTEBOOKS.values()} == set(NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_valid_thin_and_stripped(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert list(check._notebook_problems(ROOT, str(path.relative_to(ROOT)))) == []


def test_all_share_bootstrap_and_parameters():
    first, second, *studies = (cells(path) for path in NOTEBOOKS)
    assert first["parameters-text"].source == second["parameters-text"].source
    for name in ("bootstrap", "parameters"):
        assert {other[name].source for other in (second, *studies)} == {first[name].source}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_colab_shows_the_notebook_s_own_name(path):
    assert nbformat.read(path, as_version=4).metadata["colab"]["name"] == path.name


def test_every_notebook_is_stripped_by_make():
    recipe = next(
        line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "nbstripout" in line
    )
    patterns = [part for part in recipe.split() if part.endswith(".ipynb")]
    assert sorted(path for pattern in patterns for path in ROOT.glob(pattern)) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS[2:], ids=NAMES[2:])
def test_studies_say_that_full_needs_images_of_one_s_own(path):
    own = cells(path)
    assert "`full` needs `data_dir`; start with `quick`." in own["parameters-text"].source
    assert "--profile full --data DIR`" in own["rows-text"].source


def reported(study: str) -> list[dict]:
    """What the study reports, a line an accuracy, each with its Wilson interval."""
    text = (ROOT / "results" / "studies" / "reported.json").read_text(encoding="utf-8")
    lines = json.loads(text)[study]["lines"]
    for line in lines:
        n_correct = line.get("n_correct", round(line["accuracy"] * line["n"]))
        line["low"], line["high"] = proportion_confint(n_correct, line["n"], method="wilson")
    return lines


def overlap(a: dict, b: dict) -> bool:
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def test_what_is_said_of_reported_intervals_is_so():
    base, tiny, mobile = reported("dogs20")
    assert overlap(base, tiny) and overlap(tiny, mobile) and not overlap(base, mobile)
    assert [base["row"], tiny["row"], mobile["row"]] == ["ConvNeXt-Base", "ConvNeXt-Tiny", "MobileNetV2"]
    lines = reported("fine_grained")
    first = {line["images"]: line for line in lines if line["row"] == "baseline"}
    points = [100 * (line["accuracy"] - first[line["images"]]["accuracy"]) for line in lines]
    halves = [50 * (line["high"] - line["low"]) for line in lines]
    said = cells(ROOT / "notebook/studies/FineGrained.ipynb")["reported-text"].source
    assert f"between {-min(points):.2f} points below and {max(points):.2f} points above" in said
    assert f"reach {min(halves):.1f} to {max(halves):.1f} points to either side" in said
    assert all(overlap(line, first[line["images"]]) for line in lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_parameters_are_the_colab_form(path):
    lines = cells(path)["parameters"].source.splitlines()[1:]
    names = [line.split(" = ")[0] for line in lines]
    assert names == ["profile", "protocol", "data_dir", "results_dir", "runs_dir", "seed"]
    assert all("# @param" in line for line in lines)


def run_cell(path: Path, folder: Path, **replaced: str) -> subprocess.CompletedProcess:
    """The bootstrap cell in a fresh interpreter, started in `folder`, without IPython's magic line."""
    source = cells(path)["bootstrap"].source.replace("%xmode Minimal", "")
    for old, new in replaced.items():
        line = next(line for line in source.splitlines() if line.startswith(f"{old} = "))
        source = source.replace(line, f"{old} = {new!r}")
    return subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebook"], ids=["root", "notebook"])
def test_bootstrap_finds_the_checkout_and_names_versions(folder):
    done = run_cell(NOTEBOOKS[0], folder, REPO_URL="https://invalid.invalid/x")
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__.split('+')[0]}" in done.stdout and "numpy" in done.stdout
    assert str(ROOT) not in done.stdout


def miniature_repository(folder: Path) -> str:
    """A git repository with the files that the bootstrap needs; its address."""
    for name in ("src/__init__.py", "src/bootstrap.py", "requirements.txt"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "src/experiment.py").write_text("", encoding="utf-8")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    return folder.as_uri()


def test_bootstrap_clones_once(tmp_path):
    url = miniature_repository(tmp_path / "origin" / "thing")
    (tmp_path / "colab").mkdir()
    for _ in range(2):
        done = run_cell(NOTEBOOKS[1], tmp_path / "colab", REPO_URL=url)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "colab" / "thing" / "src" / "bootstrap.py").is_file()


def test_bootstrap_with_a_wrong_address_says_so(tmp_path):
    done = run_cell(NOTEBOOKS[0], tmp_path, REPO_URL=(tmp_path / "nothing").as_uri())
    assert done.returncode != 0
    assert "REPO_URL" in done.stderr and "nothing" in done.stderr and len(done.stderr.splitlines()) < 20


# What it says of the machine


def test_gpus_are_named_without_starting_cuda(tmp_path, monkeypatch):
    """Once CUDA has started, a notebook's processes cannot be forked for several GPUs."""

    def started(*_, **__):
        raise AssertionError("CUDA was started")

    for name in ("_lazy_init", "is_available", "device_count", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, started)
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'Tesla T4, 15360 MiB'\necho 'Tesla T4, 15360 MiB'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert bootstrap.describe().endswith("| Tesla T4, 15360 MiB; Tesla T4, 15360 MiB")
    driver.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert bootstrap.describe().endswith("| no GPU: the CPU computes")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert bootstrap.describe().endswith("| no GPU: the CPU computes")


# Installing


@pytest.fixture
def pip(monkeypatch):
    """Calls of pip instead of pip: each entry is (arguments, text of the constraints file)."""
    calls = []

    def fake(command, **_):
        calls.append((command, Path(command[command.index("-c") + 1]).read_text(encoding="utf-8")))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(bootstrap.subprocess, "run", fake)
    return calls


def requirements(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "requirements.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_requirement_is_a_floor_that_bootstrap_can_read():
    lines = [
        line for line in bootstrap.REQUIREMENTS.read_text(encoding="utf-8").splitlines() if line[0] != "#"
    ]
    names = {line.split(">=")[0] for line in lines}
    assert all(bootstrap._release(line.split(">=")[1]) for line in lines)
    assert set(bootstrap.PINNED) <= names


def test_pip_is_not_called_where_all_is_there(pip):
    assert bootstrap.missing() == []
    assert bootstrap.install_missing() == []
    assert pip == []


def test_only_the_missing_is_installed_and_torch_and_numpy_are_pinned(pip, tmp_path):
    path = requirements(tmp_path, "# why\ntorch>=2.0\nno-such-package>=1.0  # here\nnumpy>=999\n")
    assert bootstrap.install_missing(path) == ["no-such-package>=1.0", "numpy>=999"]
    ((command, constraints),) = pip
    assert command[-2:] == ["no-such-package>=1.0", "numpy>=999"]
    assert f"torch=={bootstrap._version('torch')}" in constraints.split()
    assert f"numpy=={np.__version__}" in constraints.split()


def test_what_is_not_installed_is_not_pinned(pip, tmp_path, monkeypatch):
    installed = {"torch": "2.11.0+cu128"}
    monkeypatch.setattr(bootstrap, "_version", installed.get)
    bootstrap.install_missing(requirements(tmp_path, "torch>=2.6\nnumpy>=1.26\n"))
    assert pip[0][0][-1] == "numpy>=1.26" and pip[0][1] == "torch==2.11.0+cu128"


def test_a_failing_pip_is_one_screen(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="noise\n" * 500 + "ERROR: no matching distribution")
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SetupError) as error:
        bootstrap.install_missing(requirements(tmp_path, "no-such-package>=1.0\n"))
    assert "no-such-package" in str(error.value) and "no matching distribution" in str(error.value)
    assert len(str(error.value).splitlines()) < 15


@pytest.mark.parametrize(
    ("installed", "floor", "enough"),
    [
        ("2.11.0+cu128", "2.6", True),
        ("2.6", "2.6.0", True),
        ("2.5.9", "2.6", False),
        ("1.0.9", "1.0.20", False),
    ],
)
def test_versions_are_compared_as_numbers(installed, floor, enough):
    assert (bootstrap._release(installed) >= bootstrap._release(floor)) is enough


def test_drive_outside_colab_is_an_error():
    with pytest.raises(SetupError, match="runs_dir"):
        bootstrap.mount_drive("runs")


def test_token_of_the_environment_wins_and_its_absence_is_no_error(monkeypatch):
    userdata = SimpleNamespace(get=lambda name: "from-colab")
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(userdata=userdata))
    monkeypatch.setenv("HF_TOKEN", "mine")
    bootstrap.read_colab_secret("HF_TOKEN")
    assert bootstrap.os.environ["HF_TOKEN"] == "mine"
    monkeypatch.setenv("HF_TOKEN", "")
    bootstrap.read_colab_secret("HF_TOKEN")
    assert bootstrap.os.environ["HF_TOKEN"] == "from-colab"
    monkeypatch.setitem(sys.modules, "google.colab", None)
    monkeypatch.delenv("HF_TOKEN")
    bootstrap.read_colab_secret("HF_TOKEN")
    assert "HF_TOKEN" not in bootstrap.os.environ


# What is displayed


def test_parts_open_the_backbone_and_tell_frozen_from_trained():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.stem = nn.Conv2d(3, 4, 1)
    model.backbone.stages = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model.backbone.requires_grad_(False)
    model.classifier = nn.Linear(2, 3)
    table = notebook.parts(model)
    assert list(table.index) == [
        "backbone.stem",
        "backbone.stages.0",
        "backbone.stages.2",
        "classifier",
        "total",
    ]
    assert list(table["parameters"]) == [16, 20, 10, 9, 55]
    assert list(table["trainable"]) == [0, 0, 0, 9, 9]


@pytest.mark.parametrize("noisy", [False, True])
def test_displayed_pictures_are_small(noisy):
    pixels = np.random.default_rng(0).integers(
        0, 256, (1200, 1800, 3) if noisy else (1, 1, 3), dtype=np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((1800, 1200)).save(buffer, "png")
    shown = notebook.small_image(buffer)
    assert Image.open(io.BytesIO(shown.data)).size == (notebook.WIDTH, 600)
    assert shown.format == ("jpeg" if noisy else "png")


def test_class_table_ranks_classes_and_names_the_usual_mistake():
    truth, prediction = [0] * 4 + [1] * 4, [0, 0, 0, 1, 1, 0, 0, 0]
    frame = pd.DataFrame({"Ground_Truth": truth, "Prediction": prediction})
    frame["Is_Correct"] = frame["Ground_Truth"] == frame["Prediction"]
    for column in ("Ground_Truth", "Prediction"):
        frame[f"{column}_Name"] = frame[column].map({0: "cat", 1: "dog"})
    table = notebook.class_table(SimpleNamespace(predictions=frame))
    assert list(table.index) == ["cat", "dog"]
    assert list(table["accuracy"]) == ["75.0%", "25.0%"]
    assert list(table["most often taken for"]) == ["dog", "cat"]


def test_comparison_waits_for_the_other_arm_and_then_names_the_numbers(tmp_path):
    result = SimpleNamespace(folder=tmp_path / "Improvement")
    assert "not run" in notebook.comparison(result)[0].data
    numbers = {"difference": 0.0123, "difference_low": -0.001, "difference_high": 0.0255, "n": 10_000}
    numbers |= {"only_a_correct": 5, "only_b_correct": 1234, "mcnemar_p": 0.0012, "same_setup": False}
    numbers |= {"setup_differences": ["image_size: 96 / 224"]}
    (tmp_path / "comparison.json").write_text(json.dumps(numbers), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "comparison.png")
    text, _ = notebook.comparison(result)
    for number in ("+1.23 points", "-0.10 to +2.55", "1,234", "0.0012", "image_size: 96 / 224"):
        assert number in text.data


@pytest.mark.slow
@pytest.mark.parametrize("name", execute.NOTEBOOKS)
def test_every_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    """In `quick`, as `make quick` and `make studies` do, but for two epochs."""
    source, folder = execute.NOTEBOOKS[name]
    book = nbformat.read(ROOT / "notebook" / source, as_version=4)
    asked = [cell for cell in book.cells if '"train.seed": seed}' in cell.source]
    assert len(asked) == 1
    asked[0].source = asked[0].source.replace("seed}", 'seed, "train.epochs": 2}')
    nbformat.write(book, tmp_path / Path(source).name)
    monkeypatch.setitem(execute.NOTEBOOKS, name, (str(tmp_path / Path(source).name), folder))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.chdir(ROOT)
    results, runs = tmp_path / "results", str(tmp_path / "runs")
    copy = execute.execute(name, str(results), {"profile": "quick", "runs_dir": runs})
    done = [cell for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in done)
    assert not [out for cell in done for out in cell.outputs if out.output_type == "error"]
    metrics = json.loads((results / folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["epochs"] == 2 and metrics["profile"] == "quick"
    beside = results / folder / "beside_reported.csv"
    assert beside.exists() == folder.startswith("studies/")


def test_tidy_drops_progress_bars_and_keeps_the_rest(tmp_path):
    bar = nbformat.v4.new_output("display_data", {execute.PROGRESS_BAR: {}, "text/plain": "0%|"})
    line = nbformat.v4.new_output("stream", text="epoch 1")
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("x", outputs=[bar, line])], metadata={"widgets": {"state": {}}}
    )
    nbformat.write(book, tmp_path / "n.ipynb")
    execute.tidy(tmp_path / "n.ipynb")
    kept = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    assert [output.output_type for output in kept.cells[0].outputs] == ["stream"]
    assert "widgets" not in kept.metadata
