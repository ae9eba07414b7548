"""What every source is made of: examples, class names, and checks that print the difference."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from src import SetupError

FIFTH = 0.2  # of each class, held out as `valid` where a data set has none of its own


@dataclass(frozen=True, slots=True)
class Example:
    """One image; `split` is `train`, `valid` or `test` (unlabelled: -1); `read` gives encoded bytes."""

    image_id: str
    label: int
    split: str
    read: Callable[[], bytes]


class Source(Protocol):
    """A data set: `wnids[label]` is a class's id, `class_names[label]` what people read.

    `fingerprint` (hex) changes with the files; it is cheap, while `examples` lists and checks them all.
    """

    name: str
    wnids: tuple[str, ...]
    class_names: tuple[str, ...]
    fingerprint: str

    def examples(self) -> list[Example]: ...


def hold_out(examples: Iterable[Example], share: float = FIFTH) -> list[Example]:
    """The examples with a `share` of each class (at least one of two) marked `valid`, chosen by hashed id."""
    by_class = defaultdict(list)
    for example in examples:
        by_class[example.label].append(example)
    out = []
    for label in sorted(by_class):
        ranked = sorted(by_class[label], key=lambda e: digest_of(e.image_id))
        n_valid = max(round(len(ranked) * share), int(len(ranked) > 1))
        out += [replace(e, split="valid" if rank < n_valid else "train") for rank, e in enumerate(ranked)]
    return sorted(out, key=lambda e: e.image_id)


def imagenet_names(wnids: Sequence[str], words: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Readable, unique class names: the first ImageNet synonym, else `words`', else the wnid itself.

    Two classes of one name are told apart by their second synonym, or their wnid.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())
    words = words or {}
    texts = [info.label_name_to_description(w) if w in known else words.get(w, w) for w in wnids]
    synonyms = [[part.strip() for part in text.split(",")] for text in texts]
    names = [s[0] or wnid for s, wnid in zip(synonyms, wnids, strict=True)]
    for second in (lambda s, wnid: s[1] if len(s) > 1 else wnid, lambda s, wnid: wnid):
        shared = {name for name, n in Counter(names).items() if n > 1}
        names = [
            f"{s[0]} ({second(s, wnid)})" if name in shared else name
            for name, s, wnid in zip(names, synonyms, wnids, strict=True)
        ]
    return tuple(names)


def check_same(what: str, sets: Mapping[str, Iterable[str]], place: Path, remedy: str) -> None:
    """Raise `SetupError` printing the difference unless both named sets hold the same."""
    (name_a, a), (name_b, b) = ((name, set(values)) for name, values in sets.items())
    lines = [
        f"{len(only)} {what} only in {name}: {some(sorted(only))}"
        for name, only in ((name_a, a - b), (name_b, b - a))
        if only
    ]
    if lines:
        raise SetupError(f"{place}: {'; '.join(lines)}. {remedy}")


def some(names: Sequence[str], n: int = 10) -> str:
    """The first `n` names, and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def name_of(folder: Path) -> str:
    """A short name for what is in `folder`, fit for a file's: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:40] or "images"


def digest_of(*parts: object) -> str:
    """A fingerprint: SHA-256 of what the parts print as, 32 hexadecimal digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def stat_of(path: Path) -> tuple[str, int, int]:
    """Name, size and mtime in ns: what a file's fingerprint is made of."""
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns
