"""`make paper`, `make slides`: the documents, compiled by Typst from the texts beside them and from results/.

    python -m tools.documents paper
    python -m tools.documents slides

The documents read every number from `results/`. What they read has to be there and has to agree with what it
was counted from; else nothing is compiled, and each file is named with the command that writes it. The same
files give the same PDF, byte by byte: fonts come with Typst and matplotlib, and no date is written.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib
import typst
from pypdf import PdfReader, PdfWriter

from src import SetupError, analysis
from src.files import read_json, sha256, write_atomically
from src.page.read import ARMS
from tools import check

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
PHOTOGRAPHS, JPEG_QUALITY = 250_000, 55  # bytes of a PNG above which it shows some; Pillow's 0 to 95
TEXTS = ("paper/*.typ", "paper/*.bib", "presentation/*.typ", "CITATION.cff", "results/study.json")
# What the documents read of each folder of results/, and the command that writes it.
NEEDED = {
    **{arm.capitalize(): (arm, ("metrics.json", f"{arm}_history.csv")) for arm in ARMS},
    ".": ("improvement", ("comparison.json", "comparison.png")),
    "ablation": ("ablation", ("ablation.csv", "summary.csv")),
    "analysis": (
        "analysis",
        (
            "analysis.json",
            "reliability.csv",
            "superclasses.csv",
            "confused_pairs.png",
            "label_suspects.png",
        ),
    ),
    "data": ("audit", ("audit.json", "exact_duplicates.png")),
    "explain": ("explain", ("explain.json", "where_it_looks.png")),
}


@dataclass(frozen=True)
class Document:
    """A PDF, the text it is compiled from, and its language."""

    source: str
    pdf: str
    language: str = "en"


DOCUMENTS = {
    "paper": (Document("paper/Final_Paper.typ", "paper/Final_Paper.pdf"),),
    "slides": tuple(
        Document(
            "presentation/Final_Presentation.typ", f"presentation/Final_Presentation{suffix}.pdf", language
        )
        for suffix, language in (("", "en"), ("_id", "id"))
    ),
}


def needed(root: Path) -> dict[Path, str]:
    """Files of results that the documents read -> the command that writes them."""
    return {
        root / "results" / folder / name: f"python -m src.experiment {command}"
        for folder, (command, names) in NEEDED.items()
        for name in names
    }


def missing(root: Path) -> list[str]:
    """Results that are not there, each with its command."""
    return [
        f"{path.relative_to(root)} is missing; run `{command}`"
        for path, command in needed(root).items()
        if not path.exists()
    ]


def stale(root: Path) -> list[str]:
    """Results that are not what they were counted from gives, each with its command."""
    commands = {str(path.relative_to(root)): command for path, command in needed(root).items()}
    counted = [*check.results(root), *check.studies(root)]
    failures = [
        f"{line}; run `{commands[line.split(':')[0]]}`" if line.split(":")[0] in commands else line
        for line in counted
    ]
    failures += of_other_predictions(root)
    results = root / "results"
    data = {read_json(results / arm.capitalize() / "metrics.json")["data_fingerprint"] for arm in ARMS}
    if data != {read_json(results / "data" / "audit.json")["data_fingerprint"]}:
        name = "results/data/audit.json"
        failures.append(f"{name}: is of other data than the arms'; run `{commands[name]}`")
    return failures


def of_other_predictions(root: Path) -> list[str]:
    """What was made of the arms' predictions before they were made anew, each with its command."""
    failures, results = [], root / "results"
    audited = results / "data" / "audit.json"
    for arm, part in read_json(audited)["arms"].items() if audited.exists() else ():
        metrics = results / arm / "metrics.json"
        if metrics.exists() and read_json(metrics)["n_correct"] != part["all"]["n_correct"]:
            failures.append(
                f"{audited.relative_to(root)}: is of other predictions than {arm}'s; "
                "run `python -m src.experiment audit`"
            )
    for name, arms in (("analysis", ARMS), ("explain", ARMS[:2])):
        path = root / "results" / name / f"{name}.json"
        if path.exists() and read_json(path)["source_sha256"] != analysis.sources(root / "results", arms):
            failures.append(
                f"{path.relative_to(root)}: is of other predictions than the arms'; "
                f"run `python -m src.experiment {name}`"
            )
    return failures


def require_results(root: Path) -> None:
    """Raises `SetupError` that names every missing or stale result with the command that writes it."""
    failures = missing(root) or stale(root)
    if failures:
        raise SetupError("\n  ".join(["the documents cannot be compiled:", *failures]))


def sources_digest(root: Path) -> str:
    """Names the state of everything the documents are made of; it stands among a PDF's keywords."""
    texts = {path for pattern in TEXTS for path in root.glob(pattern)}
    lines = [f"{path.relative_to(root)} {sha256(path)}" for path in sorted(texts | set(needed(root)))]
    return "sources:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def compiled(document: Document, root: Path) -> bytes:
    """The PDF. Raises `SetupError` with Typst's own message where the text has a fault."""
    compiler = typst.Compiler(
        root / document.source,
        root=root,
        font_paths=[FONTS],
        ignore_system_fonts=True,
        sys_inputs={"lang": document.language, "sources": sources_digest(root)},
    )
    try:
        return compiler.compile(format="pdf")
    except typst.TypstError as error:
        raise SetupError(f"{document.source}: {error.diagnostic or error}") from None


def lighter(pdf: bytes) -> bytes:
    """The PDF with its large pictures, which are of photographs, as JPEG: Typst keeps every pixel."""
    writer = PdfWriter(clone_from=BytesIO(pdf))
    writer.pdf_header = pdf[:8].decode()
    for picture in (picture for page in writer.pages for picture in page.images):
        if len(picture.data) > PHOTOGRAPHS:
            picture.replace(picture.image.convert("RGB"), quality=JPEG_QUALITY)
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def outdated(root: Path) -> list[str]:
    """Documents whose PDF is missing or was compiled from other texts or results."""
    failures = []
    for name, documents in DOCUMENTS.items():
        for document in (document for document in documents if (root / document.source).exists()):
            path = root / document.pdf
            if not path.exists() or PdfReader(path).metadata.get("/Keywords") != sources_digest(root):
                failures.append(f"{document.pdf}: is not of these results; run `make {name}`")
    return failures


def main(arguments: list[str], root: Path | None = None) -> int:
    """Compile the documents named, or all; a `SetupError` is one message and exit status 2."""
    root = root or Path(__file__).resolve().parent.parent
    try:
        if unknown := set(arguments) - set(DOCUMENTS):
            raise SetupError(f"{', '.join(sorted(unknown))}: unknown; choose of {', '.join(DOCUMENTS)}.")
        require_results(root)
        for document in (document for name in arguments or DOCUMENTS for document in DOCUMENTS[name]):
            pdf = lighter(compiled(document, root))
            write_atomically(root / document.pdf, lambda partial, pdf=pdf: partial.write_bytes(pdf))
            print(
                f"{document.pdf}: {len(PdfReader(root / document.pdf).pages)} pages, {len(pdf) / 1e6:.2f} MB"
            )
    except (SetupError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
