"""A run's folder: of one run at a time, also across processes; files that are whole or not there."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from report.output_folder import check_files, occupied, write_whole

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from report.output_folder import occupied
with occupied(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_a_later_one_is_not(tmp_path):
    with occupied(tmp_path / "run"):
        with pytest.raises(ValueError, match="Another run writes to .*run now"), occupied(tmp_path / "run"):
            pass
        with occupied(tmp_path / "other"):
            pass
    with occupied(tmp_path / "run"):
        pass


def test_the_other_processes_of_one_run_are_let_in(tmp_path, monkeypatch):
    with occupied(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with occupied(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="Another run"), occupied(tmp_path):
            pass


def test_a_killed_process_leaves_the_folder_free(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="Another run"), occupied(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with occupied(tmp_path):
        pass


def test_a_failed_write_leaves_the_old_file_and_says_which(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, "old")

    def fill_the_disk(self, text, encoding):
        with open(self, "w") as file:
            file.write(text[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill_the_disk)
        with pytest.raises(OSError, match=r"No space left on device: .*results.json"):
            write_whole(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_broken_file_is_named(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    save_file({"weight": torch.ones(100)}, tmp_path / "adapter_model.safetensors")
    check_files(tmp_path)
    data, other = (tmp_path / name).read_bytes(), b"a page of something else"
    for broken in (b"", data[:-1], other):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name} is broken, or was not written to its end"):
            check_files(tmp_path)
