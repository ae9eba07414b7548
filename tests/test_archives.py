"""Data sets that come as archives: the layout is unpacked whole, nothing else is, and nowhere else."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest
from test_sources import SHORT, server  # noqa: F401  (a fixture)

from src import SetupError
from src.config import CHOICES, DataConfig
from src.data import archives, sources
from src.data.archives import ARCHIVES, Archive
from src.data.download import download
from src.data.miniature import COUNTS, birds, dogs, food
from src.data.sources import Cub200, FoodX251, StanfordDogs, open_source

# What each archive of a data set holds, by the first part of the miniature's names.
PARTS = {
    "download_dogs": (dogs, StanfordDogs, {"images.tar": "Images/", "lists.tar": ""}),
    "download_birds": (birds, Cub200, {"CUB_200_2011.tgz": ""}),
    "download_food": (
        *(food, FoodX251),
        {"annot.tar": "", "train.tar": "train_set/", "val.tar": "val_set/", "test.tar": "test_set/"},
    ),
}


def tar_of(files: dict[str, bytes], packed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def served(server, monkeypatch):  # noqa: F811
    """`served(name)`: the miniature in the archives of the data set `name`, which count as the official."""

    def serve(name: str, **instead: bytes) -> dict[str, bytes]:
        make, kind, parts = PARTS[name]
        files, made = make(), []
        for archive, start in parts.items():
            folder = "CUB_200_2011/" if archive.endswith("tgz") else ""  # the only one with a folder around
            own = {folder + n: files.pop(n) for n in list(files) if start and n.startswith(start)}
            if not start:
                own = {folder + n: data for n, data in files.items() if folder or "/" not in n}
            data = instead.get(archive.partition(".")[0]) or tar_of(own, archive.endswith("tgz"))
            server.files[f"/{archive}"] = data
            url = server.url.replace("tiny.zip", archive)
            digest = hashlib.sha256 if name == "download_dogs" else hashlib.md5
            made.append(Archive(url, digest(data).hexdigest(), len(data) if folder else 0))
        monkeypatch.setitem(ARCHIVES, name, tuple(made))
        monkeypatch.setattr(archives, "download", partial(download, patience=SHORT))
        monkeypatch.setattr(sources, "_study_counts", lambda: {kind: COUNTS[kind]})
        return make()

    serve.server = server
    return serve


@pytest.mark.parametrize("name", PARTS)
def test_the_archives_become_the_layout_and_are_not_fetched_again(name, served, tmp_path):
    files, kind = served(name), PARTS[name][1]
    served.server.faults = [1000, None, (503,)]
    source = open_source(DataConfig(source=name), tmp_path)
    assert type(source) is kind
    found = {example.image_id: example.read() for example in source.examples()}
    assert found == {n: data for n, data in files.items() if n.endswith(".jpg")}
    n_asked = len(served.server.asked)
    n_failed = 2 if len(ARCHIVES[name]) > 1 else 1
    assert n_asked == len(ARCHIVES[name]) + n_failed
    again = open_source(DataConfig(source=name), tmp_path)
    assert again.fingerprint == source.fingerprint and len(served.server.asked) == n_asked
    left = {path.name for path in (tmp_path / "downloads").iterdir()}
    assert name in left and all(n == name or n.endswith(".lock") for n in left)  # no archive, nothing partial


def test_a_second_archive_that_fails_keeps_the_first(served, tmp_path):
    served("download_dogs")
    served.server.faults = [None, (404,)]
    with pytest.raises(SetupError, match=r"lists.tar: 0 bytes came \(HTTP 404.*run again"):
        open_source(DataConfig(source="download_dogs"), tmp_path)
    assert not (tmp_path / "downloads" / "download_dogs").exists()
    served.server.asked.clear()
    open_source(DataConfig(source="download_dogs"), tmp_path).examples()
    assert served.server.asked == [None]


def test_other_bytes_are_not_unpacked(served, tmp_path):
    served("download_dogs")
    served.server.files["/lists.tar"] = tar_of({"train_list.mat": b"another"})
    with pytest.raises(SetupError, match="(?s)lists.tar: got .* SHA-256 .*is removed"):
        open_source(DataConfig(source="download_dogs"), tmp_path)
    assert not list((tmp_path / "downloads").rglob("*.mat"))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-{}", "link"])
def test_a_member_that_points_outside_ends_it(name, served, tmp_path):
    buffer, outside = io.BytesIO(), tmp_path / "outside"
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name.format(outside.parent.name))
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, str(outside)
        archive.addfile(member)
    served("download_birds", CUB_200_2011=buffer.getvalue())
    if name.startswith("/"):  # taken as relative, as tar does; then it is not the data set
        message = "is not the data set that was fetched. Remove"
    else:
        message = "CUB_200_2011.tgz cannot be unpacked .*outside|AbsoluteLink"
    with pytest.raises(SetupError, match=message):
        open_source(DataConfig(source="download_birds"), tmp_path / "cache")
    assert not Path(name.format(outside.parent.name)).is_absolute() or not Path(name).exists()
    kept = [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")]
    assert set(kept) == {"cache"} and not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_is_said_and_the_archive_kept(served, tmp_path, monkeypatch):
    served("download_birds")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", full)
        with pytest.raises(SetupError, match="No space left.*--cache DIR.*kept"):
            open_source(DataConfig(source="download_birds"), tmp_path)
    served.server.asked.clear()
    open_source(DataConfig(source="download_birds"), tmp_path).examples()
    assert not served.server.asked


def test_what_was_fetched_and_is_damaged_since_says_what_to_do(served, tmp_path):
    served("download_food")
    open_source(DataConfig(source="download_food"), tmp_path)
    folder = tmp_path / "downloads" / "download_food"
    (folder / "val_info.csv").unlink()
    with pytest.raises(SetupError, match=f"there is no val_info.csv. Remove {folder}, and it is fetched"):
        open_source(DataConfig(source="download_food"), tmp_path).examples()
    shutil.rmtree(folder)
    open_source(DataConfig(source="download_food"), tmp_path).examples()


def test_archives_are_the_official_ones():
    assert set(ARCHIVES) == {name for name in CHOICES["data.source"] if name.startswith("download_")}
    birds_archive = ARCHIVES["download_birds"][0]
    assert f"{birds_archive}" == (
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz "
        "(1,150,585,339 bytes, MD5 97eceeb196236b17998738112f37df78)"
    )
    assert [a.name for a in ARCHIVES["download_dogs"]] == ["images.tar", "lists.tar"]
    assert [len(a.checksum) for name in ARCHIVES for a in ARCHIVES[name]] == [64, 64, 32, 32, 32, 32, 32]


def test_data_that_are_not_named_can_be_fetched():
    with pytest.raises(SetupError, match="--data DIR.*download_dogs, download_birds, download_food"):
        open_source(DataConfig(source="local"), Path("unused"))
