import dataclasses
import shutil
import threading

import pytest

from demo import wheels
from demo.cache import FetchError
from demo_fakes import Heard, build_wheel, serve_only


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    wheel = build_wheel(folder, "some-data", "1.0", {"some_data/items.bin": b"\x00" * 300_000})
    serve_only(monkeypatch, folder)
    return wheel


def test_a_wheel_is_downloaded_without_its_dependencies_checked_and_read(index, tmp_path):
    heard = Heard()
    path = wheels.download(index, tmp_path / "in", heard)
    assert wheels.extract(path, "some_data/items.bin", tmp_path / "deep" / "items").read_bytes() == b"\x00" * 300_000
    assert heard.done["downloading some-data==1.0"] == pytest.approx((index.megabytes, index.megabytes))
    assert [file.name for file in (tmp_path / "in").iterdir()] == [path.name]


def test_another_file_under_the_same_name_is_refused(index, tmp_path):
    tampered = dataclasses.replace(index, sha256="0" * 64)
    with pytest.raises(FetchError, match=f"has sha256 {index.sha256}, expected 0000"):
        wheels.download(tampered, tmp_path / "in")


def test_a_version_nobody_has_is_one_line_with_what_pip_said(index, tmp_path):
    wanted = dataclasses.replace(index, version="2.0")
    with pytest.raises(FetchError, match=r"pip could not download some-data==2\.0: .*some-data") as caught:
        wheels.download(wanted, tmp_path / "in")
    assert "\n" not in str(caught.value)


def test_a_missing_member_and_a_damaged_archive_are_one_line(index, tmp_path):
    path = wheels.download(index, tmp_path / "in")
    with pytest.raises(FetchError, match=r"does not hold a readable some_data/other"):
        wheels.extract(path, "some_data/other", tmp_path / "other")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FetchError, match=r"does not hold a readable some_data/items"):
        wheels.extract(path, "some_data/items.bin", tmp_path / "items")


def test_an_interrupted_download_does_not_leave_pip_running(index, tmp_path, monkeypatch):
    started = []
    real = wheels.subprocess.Popen

    def popen(command, **kwargs):
        started.append(real(["sleep", "60"], **kwargs))
        return started[0]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "Popen", popen)
    monkeypatch.setattr(wheels.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        wheels.download(index, tmp_path / "in")
    assert started[0].returncode is not None


def test_folders_that_come_and_go_while_pip_works_do_not_stop_the_counting(tmp_path):
    (tmp_path / "kept").write_bytes(b"x" * 1000)
    done = threading.Event()

    def churn():
        while not done.is_set():
            (tmp_path / "a" / "b").mkdir(parents=True)
            shutil.rmtree(tmp_path / "a")

    working = threading.Thread(target=churn)
    working.start()
    try:
        seen = {wheels._megabytes(tmp_path) for _ in range(3000)}  # Path.rglob stops in a sixth of them
    finally:
        done.set()
        working.join()
    assert seen == {0.001}
