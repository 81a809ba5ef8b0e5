"""The launcher, and how a job starts."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import MINUTE, ROOT, environment, launched, python, run

from sharding import processes
from v4jax import launch as launch_module
from v4jax.cli import main as cli
from v4jax.launch import _free_port, launch

# ---- the launcher, with commands that know nothing of JAX ----------------------------------------


def test_every_process_gets_its_place_and_its_lines_are_marked():
    done = run(
        *launched(
            """
        import os, sys
        names = "V4JAX_PROCESS", "V4JAX_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS"
        print(*(os.environ[name] for name in names))
        print(os.environ["V4JAX_COORDINATOR"], file=sys.stderr)
    """,
            count=3,
        )
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {i} 3 4 cpu" for i in range(3)]
    assert len(set(re.findall(r"127\.0\.0\.1:\d+", done.stderr))) == 1


def test_the_first_to_fail_gives_the_exit_code_and_ends_the_others():
    begin = time.monotonic()
    done = run(
        *launched(
            """
        import os, sys, time
        if os.environ["V4JAX_PROCESS"] == "1":
            print("my fault", file=sys.stderr)
            sys.exit(7)
        time.sleep(100)
    """,
            output="first",
        )
    )
    assert done.returncode == 7 and time.monotonic() - begin < 20
    assert "[1] my fault" in done.stderr and "process 1 ended with exit code 7" in done.stderr


def test_a_killed_process_counts_as_128_and_its_signal_also_when_others_ignore_sigterm():
    begin = time.monotonic()
    done = run(
        *launched("""
        import os, signal, time
        if os.environ["V4JAX_PROCESS"] == "1":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(100)
    """)
    )
    assert done.returncode == 137 and time.monotonic() - begin < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(number):
    code = """
        import signal, sys, time
        def say(number, _):
            print("got", number)
            sys.exit(5)
        signal.signal(signal.SIGINT, say), signal.signal(signal.SIGTERM, say)
        print("ready")
        time.sleep(100)
    """
    with subprocess.Popen(
        launched(code),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    ) as job:
        assert [job.stdout.readline()[4:], job.stdout.readline()[4:]] == ["ready\n"] * 2
        job.send_signal(number)
        out, _ = job.communicate(timeout=30)
    assert (
        sorted(out.splitlines()) == [f"[{i}] got {int(number)}" for i in (0, 1)]
        and job.returncode == 5
    )


def test_a_signal_while_processes_start_reaches_all(monkeypatch):
    jobs = []

    class Slow(launch_module._Process):
        def __init__(self, *args):
            super().__init__(*args)
            jobs.append(self)
            if self.index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launch_module, "_Process", Slow)
    code = launch(["sleep", "100"], processes=2, devices=1)
    assert code == 143 and [job.code for job in jobs] == [143, 143]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("launch --processes 0 --devices 1 -- true", "--processes: got 0"),
        ("launch --processes 1 --devices 1", "needs a command after --"),
        (
            "launch --processes 1 --devices 1 -- no-such-command-here",
            "no such command 'no-such-command-here'",
        ),
        ("launch --devices 1 -- true", "--processes"),
        (
            "launch --processes 2 --devices 4 v4jax train x.py --steps 3",
            "goes after --: v4jax launch --processes 2 --devices 4 -- v4jax train x.py --steps 3",
        ),
        ("launch --processes 2 --devices 4 --more", "unknown argument '--more'"),
    ],
)
def test_bad_launches_are_one_line(arguments, words, capsys):
    assert cli.main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_plan_is_printed_once():
    train = [sys.executable, "-m", "v4jax", "train", str(ROOT / "configs/demo.py"), "--dry-run"]
    options = ["--processes", "2", "--devices", "4"]
    done = run(sys.executable, "-m", "v4jax", "launch", *options, "--", *train)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 to 120") == 1 and "[1]" not in done.stdout


def test_launch_puts_signal_handlers_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert launch(["true"], 2, 1, "first") == 0
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# ---- joining -------------------------------------------------------------------------------------


def place(**variables):
    return {f"V4JAX_{name}": value for name, value in variables.items()}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (place(PROCESS="0", PROCESSES="2"), "V4JAX_PROCESSES is set, but V4JAX_COORDINATOR is not"),
        (
            place(COORDINATOR="here", PROCESS="0", PROCESSES="2"),
            "V4JAX_COORDINATOR: got 'here'; must be host:port",
        ),
        (
            place(COORDINATOR="here:1", PROCESS="2", PROCESSES="2"),
            r"V4JAX_PROCESS: got '2'; must be in \[0, V4J",
        ),
        (place(COORDINATOR="here:1", PROCESS="0", PROCESSES="-1"), "V4JAX_PROCESSES: got '-1'"),
        (place(CLUSTER="pbs"), "V4JAX_CLUSTER: got 'pbs'; allowed: slurm, tpu"),
        (place(CLUSTER="slurm", PROCESS="0"), "V4JAX_CLUSTER=slurm and V4JAX_PROCESS are both set"),
    ],
)
def test_variables_that_do_not_fit_are_refused(variables, words):
    with pytest.raises(ValueError, match=words):
        processes._settings(variables)


def test_only_what_is_asked_for_is_detected():
    slurm = dict(
        SLURM_JOB_ID="1",
        SLURM_NTASKS="2",
        SLURM_PROCID="0",
        SLURM_LOCALID="0",
        SLURM_STEP_NODELIST="node1",
    )
    assert processes._settings(slurm) is None
    assert processes._settings(slurm | place(CLUSTER="slurm")) == {
        "cluster_detection_method": "slurm"
    }
    assert processes._settings(place(CLUSTER="tpu")) == {"cluster_detection_method": "gcetpu"}
    on_gke = place(CLUSTER="tpu") | {"TPU_WORKER_HOSTNAMES": "a,b"}
    assert processes._settings(on_gke) == {"cluster_detection_method": "gketpu"}
    here = processes._settings(place(COORDINATOR="127.0.0.1:9", PROCESS="1", PROCESSES="2"))
    assert here["coordinator_bind_address"] == "127.0.0.1:9" and here["process_id"] == 1
    there = processes._settings(place(COORDINATOR="node1:9", PROCESS="1", PROCESSES="2"))
    assert "coordinator_bind_address" not in there


def test_slurm_is_asked_when_its_variables_are_there_and_refused_when_not(tmp_path):
    code = python("""
        import jax
        from sharding.processes import start
        start()
        print(jax.process_count(), jax.device_count())
    """)
    cpu = (
        environment()
        | place(CLUSTER="slurm")
        | dict(JAX_NUM_CPU_DEVICES="3", JAX_COORDINATOR_PORT=str(_free_port()))
    )
    job = cpu | dict(SLURM_JOB_ID="7", SLURM_NTASKS="2", SLURM_STEP_NODELIST="localhost")
    tasks = [
        subprocess.Popen(
            code, stdout=subprocess.PIPE, text=True, env=job | dict(SLURM_PROCID=i, SLURM_LOCALID=i)
        )
        for i in "01"
    ]
    assert [task.communicate(timeout=MINUTE)[0] for task in tasks] == ["2 6\n"] * 2
    alone = [sys.executable, "-m", "v4jax", "generate", str(tmp_path), "--tokens", "1"]
    done = subprocess.run(alone, capture_output=True, text=True, env=cpu, timeout=MINUTE)
    assert (
        done.returncode == 2
        and "V4JAX_CLUSTER=slurm: this machine is not part of one" in done.stderr
    )
