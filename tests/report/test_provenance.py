"""`provenance`: what it says about commit, machine and versions, inside and outside a repository."""

import json
import subprocess

import torch

from report import provenance


def run_git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_has_what_a_reader_needs_and_is_json(tmp_path):
    record = json.loads(json.dumps(provenance(str(tmp_path / "script.py"), {"a": 1}, seed=3)))
    assert record["script"] == f"{tmp_path.name}/script.py"
    assert record["config"] == {"a": 1} and record["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["num_cores"] >= 1


def test_git_is_none_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance(str(tmp_path / "script.py"), {})["git"] is None


def test_git_tells_the_commit_and_whether_it_is_dirty(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("")
    run_git(tmp_path, "init")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-m", "first")
    assert provenance(str(script), {})["git"] == {"commit": run_git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    script.write_text("changed")
    assert provenance(str(script), {})["git"]["dirty"]
