"""Which superclass each class of Tiny-ImageNet belongs to, from WordNet's hypernyms.

`python -m tools.superclasses FOLDER` reads `FOLDER/data.noun` of WordNet 3.0 (Princeton University; Fellbaum
1998, WordNet: An Electronic Lexical Database) and writes `src/data/superclasses.csv` anew. The file is not
part of this repository. A class's id, `n` and eight digits, is its synset's offset in that file; other
versions have other offsets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from src import SetupError
from src.analysis import SUPERCLASSES as TABLE
from src.files import write_atomically

HYPERNYMS = ("@", "@i")  # of a kind, of an instance (wninput(5WN))

# A class belongs to the first of these synsets that is among its hypernyms.
RULES = (
    ("n02084071", "dog"),
    ("n02120997", "cat"),  # feline
    ("n02370806", "hoofed mammal"),  # ungulate
    ("n01861778", "other mammal"),
    ("n01503061", "bird"),
    ("n01471682", "other vertebrate"),
    ("n02159955", "insect"),
    ("n01905661", "other invertebrate"),
    ("n00021265", "food"),  # nutriment
    ("n07555863", "food"),  # solid food
    ("n13134947", "food"),  # fruit
    ("n09287968", "landscape"),  # geological formation
    ("n03100490", "vehicle"),  # conveyance
    ("n03051540", "clothing"),
    ("n03380867", "clothing"),  # footwear
    ("n04341686", "building or structure"),
    ("n04078574", "building or structure"),  # reservoir: a water tower
    ("n04105068", "building or structure"),  # roof
    ("n03563967", "tool or utensil"),  # implement
    ("n04381994", "tool or utensil"),  # tableware
    ("n03094503", "container"),
    ("n03574816", "instrument"),
    ("n03800933", "instrument"),  # musical instrument
    ("n03405725", "furniture or appliance"),
    ("n03528263", "furniture or appliance"),  # home appliance
    ("n03278248", "machine or electronics"),  # electronic equipment
    ("n03699975", "machine or electronics"),
    ("n03700963", "machine or electronics"),  # simple machine: a wheel
    ("n04285146", "sports equipment"),
    ("n03414162", "sports equipment"),  # game equipment
    ("n00021939", "other artifact"),
)


class Synset(NamedTuple):
    """The first of its words, and the ids of its hypernyms in the file's order."""

    name: str
    hypernyms: tuple[str, ...]


def read_synsets(path: Path) -> dict[str, Synset]:
    """Id -> synset of a `data.noun` (wndb(5WN)). Raises `SetupError` where it is none of WordNet 3.0."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeError) as error:
        raise SetupError(f"{path} cannot be read ({error}). Name a folder with WordNet 3.0's.") from None
    if "WordNet 3.0 Copyright" not in text[:2000]:
        raise SetupError(f"{path} is not of WordNet 3.0, whose offsets are the classes' ids. Name another.")
    return dict(_synset(line) for line in text.splitlines() if not line.startswith("  "))


def _synset(line: str) -> tuple[str, Synset]:
    """offset lexfile type n_words (word lex_id)* n_pointers (symbol offset pos source/target)* | gloss."""
    fields = line.partition(" | ")[0].split()
    n_words = int(fields[3], 16)
    pointers = fields[5 + 2 * n_words :]
    hypernyms = (
        f"n{o}" for symbol, o in zip(pointers[::4], pointers[1::4], strict=False) if symbol in HYPERNYMS
    )
    return f"n{fields[0]}", Synset(fields[4].replace("_", " "), tuple(hypernyms))


def paths(wnid: str, synsets: dict[str, Synset]) -> Iterator[tuple[str, ...]]:
    """Every way from the root to `wnid`, the first hypernyms' first."""
    hypernyms = synsets[wnid].hypernyms
    if not hypernyms:
        yield (wnid,)
    for hypernym in hypernyms:
        for path in paths(hypernym, synsets):
            yield (*path, wnid)


def placed(wnid: str, synsets: dict[str, Synset]) -> dict[str, str]:
    """A row of the table: the first rule that fits, and the names from its synset down to the class."""
    ways = list(paths(wnid, synsets))
    for group, superclass in RULES:
        for way in (way for way in ways if group in way):
            names = (synsets[step].name for step in way[way.index(group) :])
            return {"wnid": wnid, "superclass": superclass, "path": " > ".join(names)}
    raise SetupError(f"class {wnid} ({synsets[wnid].name}) is under none of the rules. Add one for it.")


def table(wnids: list[str], folder: Path) -> pd.DataFrame:
    """`wnid`, `superclass`, `path` of every class by the `data.noun` in `folder`."""
    synsets = read_synsets(Path(folder) / "data.noun")
    return pd.DataFrame([placed(wnid, synsets) for wnid in wnids])


def main(arguments: list[str]) -> int:
    """Write the table anew for the classes that it has."""
    if len(arguments) != 1:
        print("usage: python -m tools.superclasses FOLDER", file=sys.stderr)
        return 2
    try:
        written = table(pd.read_csv(TABLE)["wnid"].tolist(), Path(arguments[0]))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(TABLE, lambda partial: written.to_csv(partial, index=False, lineterminator="\n"))
    print(written["superclass"].value_counts().to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
