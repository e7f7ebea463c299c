"""Reading safetensors folders: what the format's own library writes comes back, faults do not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nybble.checkpoint import Checkpoint, reader
from nybble.checkpoint.header import DTYPES, MAX_HEADER_BYTES, read_header
from nybble.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file made by hand, so that it can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards and their index; returns the tensors."""
    tensors = {name: torch.randn(3, 4) for name in ("a", "b", "c")}
    save_file({"a": tensors["a"]}, folder / "one.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def remap(folder: Path, **files: Any) -> None:
    """Change the weight map of a sharded folder."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= files
    (folder / INDEX).write_text(json.dumps(index))


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def sample(dtype: torch.dtype) -> torch.Tensor:
    bits = torch.randint(0, 2 if dtype is torch.bool else 120, (5, 7 * dtype.itemsize))
    return bits.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back_as_the_library_wrote_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"matrix": sample(dtype), "scalar": sample(dtype)[0, 0].clone()}
    tensors["empty"] = torch.empty(0, 3, dtype=dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype == checkpoint.info(name).dtype
        assert found.shape == tensor.shape == checkpoint.info(name).shape
        assert as_bytes(found) == as_bytes(tensor)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint) == 3
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in tensors)
    assert checkpoint.info("b").file.name == "two.safetensors"


def test_a_tensor_that_the_index_forgets_is_read_and_the_index_decides_between_two(
    tmp_path: Path,
) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    save_file({"c": torch.ones(1), "extra": torch.ones(2)}, tmp_path / "three.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.names()) == ["a", "b", "c", "extra"]
    assert [checkpoint.tensor(name).item() for name in "abc"] == [1, 0, 1]


def test_a_tensor_in_two_shards_that_the_index_forgets_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "x": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(1), "x": torch.zeros(1)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"one\.safetensors and two\.safetensors both hold"):
        Checkpoint.open(tmp_path)


def test_a_fingerprint_tells_weights_apart_by_name_shape_and_value(tmp_path: Path) -> None:
    def fingerprint(name: str, tensor: torch.Tensor) -> str:
        save_file({name: tensor}, tmp_path / "model.safetensors")
        return Checkpoint.open(tmp_path).fingerprint()

    ones = torch.ones(4)
    seen = [("a", ones), ("b", ones), ("a", ones.view(2, 2)), ("a", ones * 2), ("a", ones.half())]
    assert len({fingerprint(*model) for model in seen}) == len(seen)
    assert fingerprint("a", ones) == fingerprint("a", ones)
    (tmp_path / "model.safetensors").write_bytes(raw_file({"\ud800": entry(0, 1)}, b"a"))
    assert Checkpoint.open(tmp_path).fingerprint()


def test_a_single_file_may_have_any_name_and_model_safetensors_is_preferred(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert "a" in Checkpoint.open(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).names() == ["b"]
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \*\.safetensors files"):
        Checkpoint.open(tmp_path)


def test_a_tensor_is_a_view_whose_changes_stay_in_memory(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(tmp_path)
    first, second = checkpoint.tensor("a"), checkpoint.tensor("a")
    assert first.data_ptr() == second.data_ptr()
    first[0] = 1
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_tensor_outlives_its_checkpoint_and_its_released_pages(tmp_path: Path) -> None:
    weight = torch.randn(64, 1024)
    save_file({"a": weight}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.release("a")
    tensor = checkpoint.tensor("a")
    assert torch.equal(tensor, weight)
    checkpoint.release("a")
    del checkpoint
    assert torch.equal(tensor, weight)


def test_an_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    weight = torch.randn(3)
    header = {"byte": entry(0, 1), "a": entry(1, 13, [3], "F32")}
    data = b"\x07" + weight.numpy().tobytes()
    for padding in range(4):
        text = json.dumps(header).encode() + b" " * padding
        (tmp_path / "model.safetensors").write_bytes(raw_file(text, data))
        found = Checkpoint.open(tmp_path).tensor("a")
        assert torch.equal(found, weight)
        assert found.data_ptr() % 4 == 0


def test_expect_names_file_tensor_and_both_sides(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.expect("a", (2, 3), [torch.float32, torch.float16]).shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"model.safetensors.*'a' is \(2, 3\) where \(3, 2\)"):
        checkpoint.expect("a", (3, 2))
    with pytest.raises(CheckpointError, match=r"'a' is torch.float32 where torch.int32 or torch"):
        checkpoint.expect("a", dtypes=[torch.int32, torch.int64])
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        checkpoint.expect("b")


BROKEN_FILES = {
    "is empty": b"",
    "less than a safetensors header": b"1234567",
    "no safetensors file": raw_file({}, length=MAX_HEADER_BYTES + 1),
    "header claims 1000 bytes": raw_file({}, length=1000),
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "not UTF-8": raw_file(b"\xff\xfe{}"),
    "not valid JSON": raw_file(b"{,}"),
    "nested too deeply": raw_file(b'{"a":' + b"[" * 200_000),
    "does not hold a JSON object": raw_file([1]),
    "the name 'a' stands in it twice": raw_file(b'{"a":{},"a":{}}'),
    "__metadata__": raw_file({"__metadata__": 3}),
    "'a' needs dtype": raw_file({"a": {"dtype": "U8"}}),
    "'a' has the dtype 'F4'": raw_file({"a": entry(0, 1, dtype="F4")}, b"0"),
    r"'a' has the dtype \[\]": raw_file({"a": entry(0, 1, dtype=[])}, b"0"),
    "'a' has an impossible shape": raw_file({"a": entry(0, 1, [-1])}, b"0"),
    "impossible shape or": raw_file({"a": entry(0, 1, [True])}, b"0"),
    "shape or data_offsets": raw_file({"a": {**entry(0, 1), "data_offsets": [0]}}, b"0"),
    "has an impossible shape;": raw_file({"a": entry(0, 0, [2**40, 2**40, 0])}),
    "impossible shape": raw_file({"a": entry(0, 1, [1] * 65)}, b"0"),
    "needs 2 bytes": raw_file({"a": entry(0, 1, [2])}, b"0"),
    "span -1": raw_file({"a": entry(1, 0, [1])}, b"0"),
    "is cut off": raw_file({"a": entry(0, 9)}, b"0"),
    "'b' overlaps": raw_file({"a": entry(0, 2), "b": entry(1, 3)}, b"000"),
    "'b' leaves a gap": raw_file({"a": entry(0, 1), "b": entry(2, 3)}, b"000"),
    "2 bytes follow": raw_file({"a": entry(0, 1)}, b"000"),
}


@pytest.mark.parametrize("problem", BROKEN_FILES)
def test_a_broken_file_is_refused_at_open(tmp_path: Path, problem: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(BROKEN_FILES[problem])
    with pytest.raises(CheckpointError, match=problem) as caught:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_every_truncation_is_found_at_open(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3), "b": torch.ones(2, dtype=torch.bool)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            Checkpoint.open(tmp_path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)
NUMBERS = st.integers(-3, 40) | st.integers() | JUNK
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "f32"]) | JUNK,
        "shape": st.lists(NUMBERS, max_size=4) | JUNK,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JUNK,
    }
)


def check_file(path: Path) -> None:
    """A file is refused, or every tensor lies inside it and holds exactly its bytes."""
    data = path.read_bytes()
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    checkpoint = Checkpoint(path.parent, tensors)
    for name, info in tensors.items():
        assert 8 <= info.start <= info.start + info.nbytes <= len(data)
        assert as_bytes(checkpoint.tensor(name)) == data[info.start : info.start + info.nbytes]


@given(st.dictionaries(st.text(max_size=3), ENTRIES | JUNK, max_size=3), st.binary(max_size=40))
def test_no_header_makes_the_reader_crash_or_look_outside_its_file(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-header.safetensors"
    path.write_bytes(raw_file(header, data))
    check_file(path)


@given(st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=4))
def test_no_flipped_byte_makes_the_reader_crash_or_look_outside_its_file(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-bytes.safetensors"
    header = {"a": entry(0, 12, [3], "F32"), "b": entry(12, 14, [1, 1], "F16"), "c": entry(14, 16)}
    data = bytearray(raw_file(header, bytes(range(16))))
    for position, value in flips:
        data[position % len(data)] = value
    path.write_bytes(data)
    check_file(path)


def test_a_file_that_shrinks_after_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4000)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match="changed while"):
        checkpoint.tensor("a")


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*convert"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a plain file"):
        Checkpoint.open(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: permission denied; change"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    remap(tmp_path, d="one.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors has no tensor 'd'"):
        Checkpoint.open(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(tmp_path)


def test_an_index_with_a_number_for_a_file_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    remap(tmp_path, a=3)
    with pytest.raises(CheckpointError, match="names no file for 'a'"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "", "a\\b", "a\0", "\ud800"])
def test_an_index_may_name_plain_files_only(tmp_path: Path, name: str) -> None:
    sharded(tmp_path)
    remap(tmp_path, a=name)
    with pytest.raises(CheckpointError, match="no plain file name"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_a_shard_that_cannot_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    sharded(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    remap(tmp_path, a=name)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(tmp_path)


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves the model's folder"):
        Checkpoint.open(folder)
    (folder / "real").write_bytes(outside.read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("real")
    assert "a" in Checkpoint.open(folder)


def test_the_links_of_a_hub_cache_are_followed_to_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "repo/snapshots/main", tmp_path / "repo/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "0123")
    link = snapshot / "model.safetensors"
    link.symlink_to("../../blobs/0123")
    assert "a" in Checkpoint.open(snapshot)
    (tmp_path / "repo/secret").write_bytes((blobs / "0123").read_bytes())
    link.unlink()
    link.symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="leaves the model's folder"):
        Checkpoint.open(snapshot)


def test_mapping_works_without_linux_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(reader.sys, "platform", "darwin")
    assert Checkpoint.open(tmp_path).tensor("a").tolist() == [1, 1, 1]
