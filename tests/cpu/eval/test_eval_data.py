"""Where rows come from: folders, downloads, and what is said when neither is right."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import pytest

from nybble.eval import data
from nybble.eval.data import DataError, Source, find, read_csv, read_jsonl

SOURCE = Source("bench", "fetch it from example.org.", url="https://example.org/rows.jsonl")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))


def test_a_download_is_kept(monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(b'{"a": "b"}\n')

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for _ in range(2):
        assert read_jsonl(SOURCE.fetch(), {"a": str}) == [{"a": "b"}]
    assert asked == ["https://example.org/rows.jsonl"]


def test_no_network(monkeypatch):
    def urlopen(url, timeout):
        raise OSError("unreachable")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(DataError, match=r"bench could not be downloaded \(unreachable\).*--data"):
        find(SOURCE, None, "rows.jsonl")


def test_the_hub(monkeypatch, tmp_path):
    def download(repo_id, filename, repo_type):
        assert (repo_id, repo_type) == ("org/bench", "dataset")
        if not (tmp_path / filename).exists():
            raise OSError("offline")
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("val/x.csv", "q\n1\n")
    source = Source("zipped", "by hand.", "org/bench", "all.zip")
    for _ in range(2):
        assert find(source, None, "val/x.csv").read_text() == "q\n1\n"
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "all.zip", "data/all.zip")
    assert find(Source("tarred", "", "org/bench", "all.tar"), None, "data/all.zip").exists()
    with pytest.raises(DataError, match=r"offline.*by hand"):
        Source("other", "by hand.", "org/bench", "none.jsonl").fetch()


def test_a_tar_that_writes_outside_is_refused(monkeypatch, tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        info = tarfile.TarInfo("../../escaped")
        archive.addfile(info, io.BytesIO(b""))
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "evil.tar")
    )
    with pytest.raises(DataError, match="cannot be unpacked"):
        Source("evil", "", "org/evil", "evil.tar").fetch()
    assert not (tmp_path / "escaped").exists()


def test_folders(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"a": "x"}\n')
    assert find(SOURCE, tmp_path, "a.jsonl", "b.jsonl").name == "b.jsonl"
    assert find(SOURCE, tmp_path / "b.jsonl", "a.jsonl").name == "b.jsonl"
    with pytest.raises(DataError, match=r"has no c\.jsonl.*example\.org"):
        find(SOURCE, tmp_path, "c.jsonl")
    with pytest.raises(DataError, match="is no folder"):
        find(SOURCE, tmp_path / "none", "c.jsonl")


def test_compressed_rows(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": "x"}\n\n{"a": "y"}\n'))
    assert [row["a"] for row in read_jsonl(path, {"a": str})] == ["x", "y"]
    path.write_bytes(gzip.compress(b'{"a": "x"}\n')[:-6])
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(path, {"a": str})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"{", "line 1: no JSON"),
        (b'{"a": "x"}\n[]\n', "line 2: give one JSON object"),
        (b'{"a": 1}\n', "'a' must be there, as str"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_malformed_rows(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(path, {"a": str})


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('\ufeffq,a\n"x, ""y""\nz",1\n')
    assert read_csv(path, ("q", "a"), header=True) == [{"q": 'x, "y"\nz', "a": "1"}]
    with pytest.raises(DataError, match="no column b"):
        read_csv(path, ("b",), header=True)
    path.write_text("q,a\n")
    with pytest.raises(DataError, match="no rows"):
        read_csv(path, ("q",), header=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_csv(tmp_path / "none.csv", ("q",), header=True)


def test_cells_with_any_separator_and_empty_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("q,a\n\nx\u2028y\x85z\x0c,1\n\n\n")
    assert read_csv(path, ("q", "a"), header=True) == [{"q": "x\u2028y\x85z\x0c", "a": "1"}]
    path.write_text("q\n" + "x" * 200_000 + "\n")
    with pytest.raises(DataError, match="is no table"):
        read_csv(path, ("q",), header=True)


def test_what_is_not_published_says_so():
    with pytest.raises(DataError, match=r"not published.*by hand"):
        data.Source("own", "by hand.").fetch()
