"""Checkpoint folders: read with suspicion, fingerprinted, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerprune.checkpoint import (
    Checkpoint,
    contained,
    locate,
    new_folder,
    plan_shards,
    read_header,
    write_shards,
    writer,
)
from layerprune.checkpoint.writer import TensorPart
from layerprune.errors import CheckpointError, ExportError, ModelError

TENSORS = {
    "embed.weight": torch.arange(40_000, dtype=torch.float32).view(400, 100),
    "layers.0.w": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "layers.1.w": torch.full((3, 4), 7, dtype=torch.int8),
    "layers.1.scale": torch.ones((), dtype=torch.float64),
}


def save(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    names = list(TENSORS)
    save_file({name: TENSORS[name] for name in names[:2]}, folder / "a.safetensors")
    save_file({name: TENSORS[name] for name in names[2:]}, folder / "b.safetensors")
    listed = {name: "a.safetensors" if name in names[:2] else "b.safetensors" for name in names}
    write_index(folder, listed)
    return folder


def write_index(folder: Path, listed: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def write_raw(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(dtype: str = "U8", shape: tuple[int, ...] = (4,), offsets: tuple[int, int] = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one_line_error(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_opens_what_safetensors_wrote(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path / "m"))
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        tensor = checkpoint.tensors[name]
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            assert file.read(tensor.nbytes) == value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert tensor.shape == tuple(value.shape)
    assert checkpoint.parameters == sum(value.numel() for value in TENSORS.values())
    assert checkpoint.nbytes == sum(value.nbytes for value in TENSORS.values())
    assert checkpoint.metadata == {"format": "pt"}


def test_fingerprint_ignores_sharding_and_sees_weights(tmp_path: Path) -> None:
    one = Checkpoint.open(save(tmp_path / "one")).fingerprint()
    assert one == Checkpoint.open(save_sharded(tmp_path / "two")).fingerprint()
    renamed = {("other" if name == "layers.0.w" else name): value for name, value in TENSORS.items()}
    assert one != Checkpoint.open(save(tmp_path / "renamed", renamed)).fingerprint()
    trained = {**TENSORS, "embed.weight": TENSORS["embed.weight"] + 1}
    assert one != Checkpoint.open(save(tmp_path / "trained", trained)).fingerprint()
    reshaped = {**TENSORS, "layers.0.w": TENSORS["layers.0.w"].view(4, 3).contiguous()}
    assert one != Checkpoint.open(save(tmp_path / "reshaped", reshaped)).fingerprint()


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"t": entry(offsets=(0, 8), shape=(8,))}, b"1234", "is truncated: tensor 't'"),
        ({"t": entry(), "u": entry(offsets=(2, 6))}, b"123456", "tensor 'u' overlaps tensor 't'"),
        ({"t": entry(), "u": entry(offsets=(6, 10))}, b"1234567890", "2 bytes before tensor 'u'"),
        ({"t": entry()}, b"123456", "2 bytes after tensor 't'"),
        ({"t": entry(shape=(5,))}, b"1234", "tensor 't' covers 4 bytes where U8"),
        ({"t": entry(dtype="F31")}, b"1234", "unknown dtype 'F31'"),
        ({"t": entry(offsets=(4, 0))}, b"1234", "tensor 't'"),
        ({"t": {**entry(), "shape": [-4]}}, b"1234", "impossible shape"),
        ({"t": {**entry(), "data_offsets": [0]}}, b"1234", "impossible data_offsets"),
        ({"t": {"dtype": "U8"}}, b"", "tensor 't' lacks"),
        ([1, 2], b"", "not an object"),
        ({"__metadata__": {"format": 3}, "t": entry()}, b"1234", "__metadata__"),
        (b'{"t": 1, "t": 2}', b"", "'t' occurs twice"),
        (b"{", b"", "damaged safetensors header"),
        (b"\xff\xfe", b"", "damaged safetensors header"),
    ],
)
def test_bad_header_is_one_clear_line(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as error:
        read_header(file)
    assert says in one_line_error(error)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(("length", "says"), [(10**9, "claims a header"), (5000, "is truncated: a header of 5000")])
def test_header_length_is_not_believed(tmp_path: Path, length: int, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_header(write_raw(tmp_path / "model.safetensors", {"t": entry()}, b"1234", length=length))


def test_short_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="is truncated: 3 bytes"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "none")


def test_truncated_file_names_the_tensor(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    size = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: tensor '[\w.]+' ends at byte"):
        Checkpoint.open(folder)


def test_index_faults(tmp_path: Path) -> None:
    good = {name: "a.safetensors" if i < 2 else "b.safetensors" for i, name in enumerate(TENSORS)}
    faults = {
        "names tensor 'ghost', which a.safetensors does not hold": {**good, "ghost": "a.safetensors"},
        "names 'c.safetensors', which does not exist": {**good, "ghost": "c.safetensors"},
        "names '../b.safetensors', which is not a path inside": {**good, "layers.1.w": "../b.safetensors"},
        "names '/etc/passwd', which is not a path inside": {**good, "layers.1.w": "/etc/passwd"},
        "says tensor 'embed.weight' is in b.safetensors": {**good, "embed.weight": "b.safetensors"},
    }
    for number, (says, listed) in enumerate(faults.items()):
        folder = save_sharded(tmp_path / str(number))
        write_index(folder, listed)
        with pytest.raises(CheckpointError) as error:
            Checkpoint.open(folder)
        assert says in one_line_error(error)
    folder = save_sharded(tmp_path / "damaged")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(folder)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "m")
    save_file(TENSORS, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'embed.weight' is in both .*a\.safetensors and .*b\."):
        Checkpoint.open(folder)


def test_symbolic_links(tmp_path: Path) -> None:
    save_sharded(tmp_path / "elsewhere")
    folder = save_sharded(tmp_path / "m")
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to(tmp_path / "elsewhere" / "b.safetensors")
    with pytest.raises(CheckpointError, match="a symbolic link out of the folder; refused"):
        Checkpoint.open(folder)

    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = save_sharded(cache / "snapshots" / "abc")
    (snapshot / "b.safetensors").rename(cache / "blobs" / "123")
    (snapshot / "b.safetensors").symlink_to("../../blobs/123")
    assert set(Checkpoint.open(snapshot).tensors) == set(TENSORS)
    with pytest.raises(CheckpointError, match="not a path inside"):
        contained(snapshot, "../../blobs/123")


def test_no_pickle_is_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin; pickles are never read"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        Checkpoint.open(tmp_path)


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(str(save(tmp_path / "m")))
    assert (folder.path, folder.id) == (tmp_path / "m", "m")
    assert folder.revision is None
    with pytest.raises(ModelError, match="a revision"):
        locate(str(tmp_path / "m"), "main")
    with pytest.raises(ModelError, match="is a file"):
        locate(str(tmp_path / "m" / "model.safetensors"))
    for typo in (str(tmp_path / "nn"), "./nn", "~/nn", "a/b/c", "m/nn"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError) as error:
            locate(typo)
        assert one_line_error(error).startswith(f"{typo} does not exist; expected a local folder")
    with pytest.raises(ModelError) as error:  # the tests are offline
        locate("org/name", "main")
    assert "the Hub does not give it at revision 'main'" in one_line_error(error)


def parts_of(folder: Path) -> list[TensorPart]:
    return [TensorPart.of(tensor, tensor.name) for tensor in Checkpoint.open(folder).tensors.values()]


def write(out: Path, parts: list[TensorPart], max_bytes: int | None = None) -> dict[str, torch.Tensor]:
    with new_folder(out) as folder:
        list(write_shards(folder, plan_shards(parts, max_bytes), {"format": "pt"}))
    checkpoint = Checkpoint.open(out)
    return {name: value for file in checkpoint.files for name, value in load_file(file).items()}


@pytest.mark.parametrize("max_bytes", [None, 1, 100, 200_000])
@pytest.mark.parametrize("kernel", [True, False])
def test_written_bytes_are_the_same(
    tmp_path: Path, max_bytes: int | None, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:

        def unsupported(*args: object, **kwargs: object) -> int:
            raise OSError(errno.EXDEV, "cross-device link")

        monkeypatch.setattr(os, "copy_file_range", unsupported, raising=False)
    monkeypatch.setattr(writer, "SMALL_RANGE_BYTES", 16)
    monkeypatch.setattr(writer, "BUFFER_BYTES", 1000)
    written = write(tmp_path / "out", parts_of(save_sharded(tmp_path / "m")), max_bytes)
    assert written.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(written[name], value), name
        assert written[name].dtype == value.dtype
    shards = [read_header(file).tensors for file in (tmp_path / "out").glob("*.safetensors")]
    assert max_bytes is not None or len(shards) == 1
    for tensors in shards:
        assert max_bytes is None or len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= max_bytes


def test_slices_of_an_axis(tmp_path: Path) -> None:
    value = torch.arange(5 * 6 * 4, dtype=torch.bfloat16).view(5, 24)
    folder = save(tmp_path / "m", {"columns": value, "rows": value.T.contiguous()})
    tensors = Checkpoint.open(folder).tensors
    kept = (0, 2, 3, 5)
    written = write(
        tmp_path / "out",
        [
            TensorPart.slices(tensors["columns"], "columns", 1, 6, kept),
            TensorPart.slices(tensors["rows"], "rows", 0, 6, kept),
        ],
    )
    expected = value.view(5, 6, 4)[:, kept].reshape(5, 16)
    assert torch.equal(written["columns"], expected)
    assert torch.equal(written["rows"], expected.T)
    with pytest.raises(CheckpointError, match="is not 7 equal slices"):
        TensorPart.slices(tensors["columns"], "columns", 1, 7, kept)


def test_new_folder_is_all_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep" / "out") as folder:  # noqa: PT012
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []

    with pytest.raises(ExportError) as error, new_folder(tmp_path / "out") as folder:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "No space left on device" in one_line_error(error)
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"), new_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    with pytest.raises(ExportError, match="appeared while it was being written"), new_folder(tmp_path / "late"):
        (tmp_path / "late").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "out"]


def test_another_writer_that_finishes_while_partial_folders_are_looked_at_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-gone").symlink_to(tmp_path / "nowhere")  # listed, and not there when looked at
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "out" / "x").read_text() == "x"


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write to"), new_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_source_that_shrinks(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    parts = parts_of(folder)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(ExportError, match="the file ended at byte"):
        write(tmp_path / "out", parts)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


HALF_A_FOLDER = """
import sys, time
from pathlib import Path
from layerprune.checkpoint import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HALF_A_FOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".out.partial-")

    with new_folder(out) as folder:  # the other writer is alive: its folder is left alone
        (folder / "x").write_text("x")
    assert left[0] in {path.name for path in tmp_path.iterdir()}
    (out / "x").unlink()
    out.rmdir()

    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and left[0] in {path.name for path in tmp_path.iterdir()}:
        with new_folder(out) as folder:
            (folder / "x").write_text("x")
        (out / "x").unlink()
        out.rmdir()
    assert list(tmp_path.iterdir()) == []
