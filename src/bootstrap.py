"""What a notebook needs before anything else can be imported. Standard library alone at import.

pip is called for what is missing and for nothing else, and it may never replace the torch, torchvision
or numpy that are installed: in Colab those fit its driver and are already loaded.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from src import SetupError

PINNED = ("torch", "torchvision", "numpy")
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
DRIVE = Path("/content/drive")


def prepare(drive_folder: str = "") -> str:
    """Install what is missing, read Colab's HF_TOKEN secret, mount Drive where asked, print versions.

    Returns the folder for copies of runs: `drive_folder` inside the mounted Google Drive, or "" for none.
    Raises `SetupError` where pip fails or Drive is asked for outside Colab.
    """
    install_missing()
    read_colab_secret("HF_TOKEN")
    drive = mount_drive(drive_folder) if drive_folder else ""
    print(describe())
    return drive


def missing(requirements: Path = REQUIREMENTS) -> list[str]:
    """The lines `name>=version` of a requirements file that this environment does not satisfy."""
    lines = (line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not _satisfied(line)]


def install_missing(requirements: Path = REQUIREMENTS) -> list[str]:
    """pip-install what `missing` lists, with `PINNED` held at their installed versions.

    Returns what was installed: nothing, without calling pip, where all is there. Raises `SetupError`.
    """
    wanted = missing(requirements)
    if not wanted:
        return []
    pins = [f"{name}=={version}" for name in PINNED if (version := _version(name))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(pins), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(constraints), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise SetupError(
            f"pip could not install {', '.join(wanted)} beside {', '.join(pins) or 'nothing'} "
            f"(those stay as they are):\n{reason}\n"
            "Check the connection; where versions conflict, start a fresh environment (in Colab: Runtime > "
            "Disconnect and delete runtime) or install requirements.txt by hand."
        )
    importlib.invalidate_caches()
    return wanted


def describe() -> str:
    """One line: Python, the packages that decide numbers, and the device."""
    names = ("torch", "torchvision", "timm", "numpy")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return f"Python {sys.version.split()[0]}, {versions} | {gpus() or 'no GPU: the CPU computes'}"


def gpus() -> str:
    """Names and memory of the GPUs, "" for none, by the driver's own tool.

    Asking torch would start CUDA, after which `notebook_launcher` can start no processes.
    """
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in found.splitlines() if line.strip())


def read_colab_secret(name: str) -> None:
    """Put the Colab secret `name` into the environment, unless it is there or there is no such secret."""
    if os.environ.get(name):
        return
    try:
        from google.colab import userdata

        os.environ[name] = userdata.get(name)
    except Exception:  # not Colab, no such secret, no access granted: the hub also works without a token
        return


def mount_drive(folder: str) -> str:
    """Mount Google Drive (Colab asks for consent) and return the path of `folder` in it, made if needed."""
    try:
        from google.colab import drive
    except ImportError:
        raise SetupError(
            f"DRIVE_FOLDER = {folder!r}: Google Drive can be mounted in Colab alone. Leave it empty "
            "elsewhere: runs_dir keeps the checkpoints."
        ) from None
    drive.mount(str(DRIVE))
    path = DRIVE / "MyDrive" / folder.strip("/")
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def _satisfied(requirement: str) -> bool:
    name, _, floor = requirement.partition(">=")
    installed = _version(name.strip())
    return installed is not None and _release(installed) >= _release(floor)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """`2.11.0+cu128` -> (2, 11); trailing zeros say nothing."""
    match = re.match(r"\d+(\.\d+)*", version.strip())
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
