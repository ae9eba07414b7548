"""Run one notebook and keep the executed copy beside its results.

`python -m tools.execute Baseline results/quick profile=quick runs_dir=runs/quick` writes
`results/quick/Baseline/ConvNeXt_Baseline.ipynb`, and `Animals40` for `Baseline` a study's notebook,
`results/quick/studies/animals40/Animals40.ipynb`. Each `name=value` replaces one of its parameters.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from src.folders import study_folder

ROOT = Path(__file__).resolve().parent.parent
# Notebooks by their short names: the file below notebook/, and the folder below the results.
NOTEBOOKS = {
    "Baseline": ("ConvNeXt_Baseline.ipynb", "Baseline"),
    "Improvement": ("ConvNeXt_Improvement.ipynb", "Improvement"),
    "Animals40": ("studies/Animals40.ipynb", "studies/animals40"),
    "DogBreeds20": ("studies/DogBreeds20.ipynb", "studies/dogs20"),
    "FineGrained": ("studies/FineGrained.ipynb", "studies/fine_grained"),
}
PROGRESS_BAR = "application/vnd.jupyter.widget-view+json"


def execute(name: str, results: str, parameters: dict[str, object]) -> Path:
    """Execute the notebook of `NOTEBOOKS` from the root; returns the copy's path.

    Raises papermill's `PapermillExecutionError` where a cell fails; the copy then ends with that cell.
    """
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not one in the home folder
    import papermill

    source, folder = NOTEBOOKS[name]
    is_stand_in = folder.startswith("studies/") and parameters.get("profile") == "offline"
    copy = Path(study_folder(Path(results, folder), is_stand_in), Path(source).name)
    (ROOT / copy).parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # relative paths, in the copy's metadata too
    papermill.execute_notebook(
        Path("notebook", source),
        copy,
        {"results_dir": results, **parameters},
        kernel_name="python3",
        cwd=".",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # its warnings are about ports, not about this run
    )
    tidy(copy)
    return copy


def tidy(path: Path) -> None:
    """Drop what no reader of a finished run needs: progress bars, which only live widgets can draw."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if PROGRESS_BAR not in out.get("data", {})]
    nbformat.write(notebook, path)


def main(arguments: list[str]) -> int:
    name, results, *pairs = arguments
    parameters: dict[str, object] = dict(pair.split("=", 1) for pair in pairs)
    if "seed" in parameters:
        parameters["seed"] = int(str(parameters["seed"]))
    from papermill.exceptions import PapermillExecutionError

    try:
        print(f"executed copy: {execute(name, results, parameters)}")
    except PapermillExecutionError as error:
        print(f"{NOTEBOOKS[name][0]} stopped in this cell:\n{error.source}\n\n{error.ename}: {error.evalue}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
