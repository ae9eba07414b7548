"""`make check`: what a reader relies on and a test of the code cannot see. One line a failure.

Every check takes the repository's root and returns its failures as text; `main` runs them all.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import nbformat

from src import SetupError
from src.config import STUDY_ARMS
from src.embedded import card_of
from src.evaluate import compare, read_predictions, score
from src.files import sha256, write_csv
from src.model.build import EMBEDDED_WEIGHTS
from src.page import read_results, render
from src.studies import STUDIES, reported
from src.studies.table import read_table, write_words
from tools import readme, torture

MAX_CODE_CELLS, MAX_CODE_LINES = 12, 60
MEGABYTE = 1_000_000
ARCHIVES = (".whl", ".egg", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# Tracked files that may pass 1 MB, each with its reason; none may pass 10 MB.
LARGE_FILES: dict[str, str] = {
    "results/report.html": "one file to open and to send: data, thumbnails and script lie inside",
    "weights/convnext_atto_tinyimagenet64.safetensors": "what `quick` starts from, without a hub",
}
# What the README may name though git holds no such file: what runs write, and the data set's own files.
WRITTEN_BY_RUNS = (".venv/", "cache/", "runs/", "results/quick/")
NOT_OURS = ("val_annotations.txt", "wnids.txt", "words.txt", "model.safetensors", "submission.csv")
DATA_FOLDERS = ("tiny-imagenet-200/", "train/", "valid/", "val/", "test/", "Images/")
PATH_ENDING = r"\.(py|ipynb|md|json|csv|png|txt|toml|cff|typ|pdf|yml|safetensors)$|/$"
RELATIVE_TOLERANCE = 1e-5  # losses and confidences are rounded in the CSV; counts and accuracies are not


def tracked(root: Path) -> list[str]:
    """Files that git holds or would add, as paths from the root."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(name for name in set(done.stdout.split("\0")) if name and (root / name).is_file())


def lint(root: Path) -> list[str]:
    """ruff's rules and ruff's format."""
    rules, layout = (
        subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=root, capture_output=True, text=True
        )
        for command in (("check", "--quiet", "--output-format", "concise"), ("format", "--check"))
    )
    failures = [f"ruff check: {line}" for line in (rules.stdout + rules.stderr).strip().splitlines()]
    if layout.returncode:
        names = sorted(set(re.findall(r"[\w./-]+\.(?:py|ipynb)\b", layout.stdout + layout.stderr)))
        failures.append(f"ruff format: run `make format` for {', '.join(names) or 'the lot'}")
    return failures


def notebooks(root: Path) -> list[str]:
    """Notebooks are stripped, thin, and open with a bootstrap and a `parameters` cell."""
    names = [name for name in tracked(root) if fnmatch(name, "notebook/*.ipynb")]
    return [f"{name}: {problem}" for name in names for problem in _notebook_problems(root, name)]


def _notebook_problems(root: Path, name: str) -> Iterator[str]:
    cells = nbformat.read(root / name, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    source = "\n".join(cell.source for cell in code)
    n_lines = sum(bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines())
    if any(cell.outputs or cell.execution_count for cell in code):
        yield "carries outputs; run `make notebooks`"
    if len(code) > MAX_CODE_CELLS or n_lines > MAX_CODE_LINES:
        yield (
            f"{len(code)} code cells, {n_lines} code lines; at most {MAX_CODE_CELLS} and {MAX_CODE_LINES}: "
            "move code into src"
        )
    if logic := re.search(r"^\s*(def |class |for .*epoch.*:)", source, re.MULTILINE):
        yield f"`{logic[0].strip()}` belongs in src"
    if not code or "REPO_URL" not in code[0].source:
        yield "the first code cell is not the bootstrap (REPO_URL)"
    if sum("parameters" in cell.metadata.get("tags", ()) for cell in code) != 1:
        yield "needs exactly one cell tagged `parameters`"
    if f"/blob/main/{name}" not in cells[0].source:
        yield "the first cell has no Open in Colab badge for this very file"


def executed_copies(root: Path) -> list[str]:
    """Executed notebooks under results/ ran to the end and show no path of somebody's machine."""
    failures = []
    for name in (name for name in tracked(root) if fnmatch(name, "results/*.ipynb")):
        text = (root / name).read_text(encoding="utf-8")
        if '"output_type": "error"' in text:
            failures.append(f"{name}: ended with an error; run it again")
        if found := re.search(rf"{re.escape(str(root.resolve()))}|/(home|root|Users)/[\w.]+", text):
            failures.append(f"{name}: shows a path of one machine: {found[0]}")
    return failures


def readme_names(root: Path) -> list[str]:
    """Every file, module and make target that README.md names exists."""
    text = (root / "README.md").read_text(encoding="utf-8")
    files = tracked(root)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose)
    targets = [(a or b).split("#")[0] for a, b in links if not re.match(r"\w+:|#", a or b)]
    failures = [f"README.md links to {t}, which is missing" for t in targets if not _exists(t, files, root)]
    for token in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose):
        if _is_path(token, files) and not _exists(token, files, root):
            failures.append(f"README.md names `{token}`, which does not exist")
    for module in re.findall(r"python3? -m ((?:src|tools|bench)[.\w]*)", text):
        stem = module.replace(".", "/")
        if f"{stem}.py" not in files and f"{stem}/__init__.py" not in files:
            failures.append(f"README.md runs `python -m {module}`, which does not exist")
    makefile = (root / "Makefile").read_text(encoding="utf-8") if "Makefile" in files else ""
    commands = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, flags=re.MULTILINE)
    known = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", makefile, flags=re.MULTILINE))
    return failures + [f"README.md says `make {t}`: no such target" for t in commands if t not in known]


def _is_path(token: str, files: list[str]) -> bool:
    """Whether inline code is meant as a path here: a known ending, a folder, or inside one of our folders."""
    if re.search(r"[\s:=()\[\]$,]|^[-/.~]*$|^[/~]|^\.\w+$", token):
        return False
    folders = {name.split("/")[0] for name in files if "/" in name}
    return bool(re.search(PATH_ENDING, token)) or ("/" in token and token.split("/")[0] in folders)


def _exists(token: str, files: list[str], root: Path) -> bool:
    """Whether a path or glob (`<arm>` stands for anything) is tracked, written by runs, or not ours."""
    pattern = re.sub(r"<[^>]*>|\{[^}]*\}|…|\.\.\.", "*", token.removeprefix("./"))
    if (
        pattern.startswith((*WRITTEN_BY_RUNS, *DATA_FOLDERS))
        or pattern in NOT_OURS
        or (root / pattern).exists()
    ):
        return True
    if "/" not in pattern:
        return any(fnmatch(name.rsplit("/", 1)[-1], pattern) for name in files)
    return any(fnmatch(name, pattern) or fnmatch(name, f"{pattern.rstrip('/')}/*") for name in files)


def readme_numbers(root: Path) -> list[str]:
    """The tables of README.md and bench/README.md are those that `make readme` writes."""
    failures = []
    for page in (page for page in readme.PAGES if (root / page).exists()):
        text = (root / page).read_text(encoding="utf-8")
        try:
            if readme.rewritten(text, root, page) != text:
                failures.append(f"{page}: a table differs from its results; run `make readme`")
        except (ValueError, KeyError) as error:
            failures.append(f"{page}: {error}")
    return failures


def results(root: Path) -> list[str]:
    """metrics.json and comparison.json hold the numbers of the prediction CSVs beside and below them."""
    failures = []
    for name in (name for name in tracked(root) if fnmatch(name, "results/*metrics.json")):
        tables = sorted((root / name).parent.glob("*predictions.csv"))
        if len(tables) == 1:
            failures += _differences(root, name, score(read_predictions(tables[0])))
        else:
            failures.append(f"{name}: {len(tables)} files *predictions.csv beside it, expected one")
    for name in (name for name in tracked(root) if fnmatch(name, "results/*comparison.json")):
        tables = [
            (root / name).parent / arm.capitalize() / f"{arm}_validation_predictions.csv"
            for arm in ("baseline", "improvement")
        ]
        failures += _differences(root, name, compare(*map(read_predictions, tables)))
    return failures


def studies(root: Path) -> list[str]:
    """What is made of a study's table of runs is what the table beside it gives."""
    failures = []
    for study, is_stand_in in itertools.product(STUDIES.values(), (False, True)):
        folder = study.path(root / "results", is_stand_in)
        csv = folder / f"{study.name}.csv"
        if not csv.exists():
            continue
        if (table := read_table(study, folder)).empty:
            failures.append(
                f"{csv.relative_to(root)}: has no rows; run `python -m src.experiment {study.name}`"
            )
            continue
        with tempfile.TemporaryDirectory() as scratch:
            write_words(study, Path(scratch), table)
            for counted in sorted(Path(scratch).iterdir()):
                said = folder / counted.name
                if not said.exists() or said.read_bytes() != counted.read_bytes():
                    path = said.relative_to(root)
                    failures.append(f"{path}: is not what {csv.name} gives; run `make readme`")
    return failures


def beside_reported(root: Path) -> list[str]:
    """The studies' own numbers stand beside those of the tables of runs."""
    failures = []
    for study in (STUDIES[name] for name in STUDY_ARMS):
        said = study.path(root / "results") / "beside_reported.csv"
        with tempfile.TemporaryDirectory() as scratch:
            counted = Path(scratch, said.name)
            write_csv(reported.beside_reported(study, root / "results"), counted)
            if said.exists() and said.read_bytes() != counted.read_bytes():
                failures.append(f"{said.relative_to(root)}: is not what the tables give; run `make readme`")
    return failures


def weights(root: Path) -> list[str]:
    """The weights in git are those whose hash the code knows, and their card is of results/Pretrain."""
    known = {name: (tag, digest) for tag, (name, digest) in EMBEDDED_WEIGHTS.items()}
    failures = []
    for name in (name for name in tracked(root) if fnmatch(name, "weights/*.safetensors")):
        path = root / name
        tag, expected = known.get(path.name, ("", ""))
        if (digest := sha256(path)) != expected:
            failures.append(f"{name}: SHA-256 is {digest}, the code knows {expected or 'none'}")
            continue
        metrics = json.loads((root / "results" / "Pretrain" / "metrics.json").read_text(encoding="utf-8"))
        card = path.with_name("README.md")
        if not card.exists() or card.read_text(encoding="utf-8") != card_of(path, digest, metrics):
            failures.append(
                f"{card.relative_to(root)}: is not of {path.name} and results/Pretrain; run "
                "`python -m src.experiment export --preset pretrain` as the card says"
            )
    return failures


def derived(root: Path) -> list[str]:
    """What is made of the predictions is made of these, the page and the documents of these results."""
    from tools import documents  # which asks this module whether the results are sound

    failures = [*documents.of_other_predictions(root), *documents.outdated(root)]
    page = root / "results" / "report.html"
    if page.exists() and page.read_text(encoding="utf-8") != render(read_results(page.parent)):
        failures.append("results/report.html: is not of these results; run `make report`")
    return failures


def _differences(root: Path, name: str, counted: dict) -> list[str]:
    """Numbers that the JSON file `name` does not hold as they were counted anew."""
    said = json.loads((root / name).read_text(encoding="utf-8"))
    return [
        f"{name}: {key} is {said.get(key)}, the predictions give {value}"
        for key, value in counted.items()
        if isinstance(value, int | float) and not _close(said.get(key), value)
    ]


def _close(said: object, counted: float) -> bool:
    return isinstance(said, int | float) and math.isclose(said, counted, rel_tol=RELATIVE_TOLERANCE)


def reliability(root: Path) -> list[str]:
    """Each fault was provoked as often as promised, and nothing was lost in `make torture`."""
    return torture.shortfalls(torture.read(root / torture.TABLE), torture.figures())


def sizes(root: Path) -> list[str]:
    """No tracked file over 1 MB without a reason, none over 10 MB."""
    failures = []
    for name in tracked(root):
        size = (root / name).stat().st_size
        if size > (10 * MEGABYTE if name in LARGE_FILES else MEGABYTE):
            failures.append(f"{name}: {size / MEGABYTE:.1f} MB; shrink it or keep it out of git")
    return failures


def archives(root: Path) -> list[str]:
    """No tracked archive or wheel: nobody sees what changes in it, and installers leave them behind."""
    packed = [name for name in tracked(root) if name.lower().endswith(ARCHIVES)]
    return [f"{name}: is an archive; `git rm` it, and name where it comes from instead" for name in packed]


def repo_url(root: Path) -> list[str]:
    """One address of the repository, in notebooks, badges, clone commands and CITATION.cff."""
    patterns = (
        r"REPO_URL = \\?\"(https://github\.com/[^\"\\]+)",
        r"repository-code: \"?(https://github\.com/[^\s\"]+)",
        r"git clone (https://github\.com/\S+)",
        r"colab\.research\.google\.com/(github/[\w.-]+/[\w.-]+)/blob",
    )
    found: dict[str, str] = {}
    for name in tracked(root):
        if name.endswith((".ipynb", ".md", ".cff")):
            text = (root / name).read_text(encoding="utf-8")
            for url in (url for pattern in patterns for url in re.findall(pattern, text)):
                url = url.replace("https://github.com/", "github/").removesuffix(".git").rstrip("/")
                found.setdefault(url, name)
    if len(found) <= 1:
        return []
    return ["the repository has several addresses: " + ", ".join(f"{u} ({n})" for u, n in found.items())]


CHECKS = (
    *(lint, notebooks, executed_copies, readme_names, readme_numbers),
    *(results, studies, beside_reported, weights, derived, reliability, sizes, archives, repo_url),
)


def main(root: Path | None = None) -> int:
    """Run every check, print its outcome, return the exit status."""
    root = root or Path(__file__).resolve().parent.parent
    n_failed = 0
    for check in CHECKS:
        try:
            failures = check(root)
        except (OSError, ValueError, KeyError, SetupError, subprocess.CalledProcessError) as error:
            failures = [f"could not be checked: {error}"]
        print(f"{'FAIL' if failures else 'ok':4} {check.__name__.replace('_', ' ')}")
        print("".join(f"     {failure}\n" for failure in failures), end="")
        n_failed += bool(failures)
    print(f"{len(CHECKS) - n_failed} of {len(CHECKS)} checks passed")
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
