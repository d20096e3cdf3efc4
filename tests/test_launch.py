"""The launchers, with fakes of the tools that they call; the workers' scripts for real."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
from conftest import free_port

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.s*"))

# Notes how it is called, and answers as the test has told it: with the first of the
# [exit code, output] of the first key that is in its command line, and the last one again.
FAKE = """#!{python} -ES
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
line = [pathlib.Path(__file__).name, *sys.argv[1:]]
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps(line) + "\\n")
answers = json.loads((folder / "answers").read_text())
for key, given in answers.items():
    if key in " ".join(line):
        code, output = given[0] if len(given) == 1 else given.pop(0)
        (folder / "answers").write_text(json.dumps(answers))
        print(output, file=sys.stderr if code else sys.stdout)
        sys.exit(code)
"""

TPU = {
    "PROJECT_ID": "project",
    "ZONE": "us-west4-a",
    "TPU_NAME": "slice",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "TIER": "spot",
    "POLL_SECONDS": "0",
    "BACKOFF_SECONDS": "0",
    "ATTEMPTS": "3",
}
XPK = {
    "PROJECT_ID": "project",
    "ZONE": "us-west4-a",
    "CLUSTER": "cluster",
    "WORKLOAD": "work",
    "TPU_TYPE": "tpu7x-16",
}
SLURM = {
    "NODES": "2",
    "GPUS_PER_NODE": "8",
    "CPUS_PER_NODE": "32",
    "TIME_LIMIT": "1:00:00",
}
JOB = ["lds,report", "configs/digits.py", "--workdir", "gs://bucket/it's a run"]
NEW = [[1, "NOT_FOUND: no such resource"], [0, "PROVISIONING"], [0, "ACTIVE"]]
"""The answers of describe for a slice that is asked for and comes."""


class Launcher:
    """Runs a script of a copy of the project, with fakes on the PATH."""

    def __init__(self, folder, *fakes):
        self.project, self.bin = folder / "project", folder / "bin"
        (folder / "home").mkdir()
        self.bin.mkdir()
        shutil.copytree(ROOT / "launch", self.project / "launch")
        (self.project / "configs").mkdir()
        shutil.copy(ROOT / "configs" / "digits.py", self.project / "configs")
        shutil.copy(ROOT / "setup.cfg", self.project)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder),
        }
        for name in fakes:
            self.fake(name, FAKE.format(python=sys.executable))
        self.answer()

    def fake(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def answer(self, **answers):
        """Sets the answers of the fakes; __ in a name stands for a blank."""
        spelled = {name.replace("__", " "): value for name, value in answers.items()}
        (self.bin / "answers").write_text(json.dumps(spelled))
        (self.bin / "calls").write_text("")

    def calls(self):
        return [json.loads(line) for line in (self.bin / "calls").open()]

    def start(self, script, *arguments, **settings):
        return subprocess.Popen(
            # A shell cannot hear what is ignored where it begins, as in a background job.
            ["env", "--default-signal=INT", "bash"]
            + [str(self.project / "launch" / script), *arguments],
            env=self.environment | settings,
            cwd=self.project,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script, *arguments, **settings):
        process = self.start(script, *arguments, **settings)
        process.out, process.error = process.communicate(timeout=60)
        return process


@pytest.fixture
def launcher(tmp_path):
    return Launcher(
        tmp_path, "gcloud", "xpk", "sbatch", "srun", "scontrol", "tar", "uv"
    )


def words(calls):
    """The verb of each call of gcloud, once where it is repeated."""
    verbs = [call[4] for call in calls if call[0] == "gcloud"]
    return [verb for verb, _ in groupby(verbs)]


def wait_until(true, seconds=20):
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


@pytest.mark.parametrize("script", ["tpu.sh", "xpk.sh", "slurm.sh", "worker.sh"])
def test_help_names_every_setting(launcher, script):
    """All that a script needs or has a default for."""
    text = (ROOT / "launch" / script).read_text()
    settings = re.findall(r"\bneed ([A-Z_]+)|\$\{([A-Z_]+):?-", text)
    names = {needed or optional for needed, optional in settings} - {"BASH_SOURCE"}
    assert names
    helped = launcher.run(script, "--help")
    assert helped.returncode == 0
    assert names - {"TMPDIR"} <= set(re.findall(r"[A-Z_]+", helped.out))


@pytest.mark.parametrize(
    ("script", "arguments", "settings"),
    [
        ("tpu.sh", ["retry", *JOB], TPU),
        ("xpk.sh", ["run", *JOB], XPK),
        ("slurm.sh", ["run", *JOB], SLURM),
        ("worker.sh", JOB, {"JAX_PACKAGE": "jax"}),
    ],
)
def test_a_missing_setting_is_named_before_anything_is_called(
    launcher, script, arguments, settings
):
    optional = {"POLL_SECONDS", "BACKOFF_SECONDS", "ATTEMPTS"}
    for name in settings.keys() - optional:
        others = {key: value for key, value in settings.items() if key != name}
        process = launcher.run(script, *arguments, **others)
        assert process.returncode == 2
        assert f"{name} is not set" in process.error
        assert f"such as {name}=" in process.error
    assert launcher.calls() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "name stages and a config"),
        (["train", "configs/none.py", "--workdir", "gs://b/x"], "configs/none.py"),
        (["train", "configs/digits.py"], "--workdir is missing"),
        (["train", "configs/digits.py", "--workdir", "runs/x"], "is runs/x"),
        (["train", "configs/digits.py", "--workdir=/tmp/x"], "is /tmp/x"),
    ],
)
def test_a_job_that_cannot_work_is_refused(launcher, arguments, said):
    for script, subcommand, settings in [
        ("tpu.sh", "run", TPU),
        ("tpu.sh", "retry", TPU),
        ("xpk.sh", "run", XPK),
    ]:
        process = launcher.run(script, subcommand, *arguments, **settings)
        assert process.returncode == 2
        assert said in process.error
    assert launcher.calls() == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"TIER": "cheap"}, "spot, on-demand or reserved"),
        ({"ACCELERATOR_TYPE": "tpu7x-16"}, "launch/xpk.sh"),
        ({"ACCELERATOR_TYPE": "v9-8"}, "RUNTIME_VERSION is not set"),
    ],
)
def test_a_slice_that_cannot_be_is_refused(launcher, settings, said):
    process = launcher.run("tpu.sh", "create", **TPU | settings)
    assert process.returncode == 2
    assert said in process.error
    assert launcher.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments", "settings"),
    [
        ("tpu.sh", ["create"], TPU),
        ("tpu.sh", ["create"], TPU | {"TIER": "on-demand"}),
        ("tpu.sh", ["setup"], TPU),
        ("tpu.sh", ["run", *JOB], TPU),
        ("tpu.sh", ["logs", "3"], TPU),
        ("tpu.sh", ["delete"], TPU),
        ("tpu.sh", ["retry", *JOB], TPU),
        ("xpk.sh", ["run", *JOB], XPK),
        ("xpk.sh", ["wait"], XPK),
        ("xpk.sh", ["delete"], XPK),
        ("slurm.sh", ["run", *JOB], SLURM),
    ],
)
def test_a_dry_run_prints_what_a_run_calls(launcher, script, arguments, settings):
    """And calls nothing; blanks and quotes come back as they were."""
    settings = settings | {"TFDS_DATA_DIR": "gs://bucket/the data"}
    launcher.answer(
        describe=NEW, status=[[0, "job: running"], [0, "job: exit 0\njob: exit 0"]]
    )
    process = launcher.run(
        script, arguments[0], "--dry-run", *arguments[1:], **settings
    )
    assert process.returncode == 0, process.error
    assert launcher.calls() == []
    printed = [shlex.split(line) for line in process.out.splitlines()]

    process = launcher.run(script, *arguments, **settings)
    assert process.returncode == 0, process.error
    assert [call for call, _ in groupby(launcher.calls())] == printed


def test_create_asks_for_the_slice_and_waits_for_it(launcher):
    launcher.answer(describe=NEW)
    assert launcher.run("tpu.sh", "create", **TPU).returncode == 0
    describe, create, *waits = launcher.calls()
    place = ["--zone=us-west4-a", "--project=project", "--quiet"]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert create == [
        *(*queued, "create", "slice", "--node-id=slice"),
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        *("--spot", *place),
    ]
    assert waits == [describe, describe]
    assert describe == [
        *(*queued, "describe", "slice", "--format=value(state.state)", *place)
    ]


def test_create_takes_a_slice_that_is_there(launcher):
    launcher.answer(describe=[[0, "WAITING_FOR_RESOURCES"], [0, "ACTIVE"]])
    assert launcher.run("tpu.sh", "create", **TPU).returncode == 0
    assert words(launcher.calls()) == ["describe"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_gives_up_what_will_not_come(launcher, state):
    launcher.answer(describe=[*NEW[:2], [0, state]])
    process = launcher.run("tpu.sh", "create", **TPU)
    assert process.returncode == 1
    assert f"slice is {state}" in process.error


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([[0, "job: running\njob: exit 0"], [0, "job: exit 0\njob: exit 0"]], 0),
        ([[0, "job: exit 0\njob: exit 134"]], 134),
        ([[0, "job: exit 134\njob: exit 2\njob: exit 130"]], 2),
        ([[0, "job: exit 134\njob: exit 130\njob: exit 0"]], 130),
        ([[0, "job: exit 1\njob: running"], [0, "job: exit 1\njob: exit 134"]], 1),
        ([[0, "job: exit 0\njob: lost"]], 75),
        ([[255, "no route"], [0, "job: exit 0"]], 0),
        ([[255, "no route"]], 75),
    ],
)
def test_run_exits_as_its_workers(launcher, statuses, code):
    """0 only if all did; it waits for all; ssh may fail now and then."""
    launcher.answer(status=statuses, describe=[[0, "ACTIVE"]])
    process = launcher.run("tpu.sh", "run", *JOB, **TPU)
    assert process.returncode == code, process.error


def test_run_does_not_wait_for_a_slice_that_is_gone(launcher):
    launcher.answer(status=[[255, "no route"]], describe=[[0, "SUSPENDED"]])
    assert launcher.run("tpu.sh", "run", *JOB, **TPU).returncode == 75
    assert words(launcher.calls()) == ["ssh", "describe"]


def test_run_outlives_a_network_that_is_gone(launcher):
    """The job does not need it; only gcloud can say that the slice is gone."""
    lost = [[255, "no network"]] * 15
    launcher.answer(status=[*lost, [0, "job: exit 0"]], describe=[[1, "no network"]])
    assert launcher.run("tpu.sh", "run", *JOB, **TPU).returncode == 0


ATTEMPT = ["describe", "create", "describe", "scp", "ssh", "delete"]


def test_retry_goes_on_after_a_preemption(launcher):
    """And deletes the slice before and after."""
    preempted = [*NEW, [0, "SUSPENDED"], *NEW]
    launcher.answer(
        status=[[0, "job: running"], [255, "no route"], [0, "job: exit 0"]],
        describe=preempted,
    )
    process = launcher.run("tpu.sh", "retry", *JOB, **TPU)
    assert process.returncode == 0, process.error
    lost = [*ATTEMPT[:-1], "describe", "delete"]
    assert words(launcher.calls()) == lost + ATTEMPT


def test_retry_goes_on_after_a_job_that_stopped(launcher):
    launcher.answer(
        status=[[0, "job: exit 130\njob: exit 130"], [0, "job: exit 0"]],
        describe=NEW + NEW,
    )
    assert launcher.run("tpu.sh", "retry", *JOB, **TPU).returncode == 0
    assert words(launcher.calls()) == ATTEMPT + ATTEMPT


def test_retry_does_not_repeat_a_wrong_setting(launcher):
    launcher.answer(status=[[0, "job: exit 2\njob: exit 134"]], describe=NEW)
    assert launcher.run("tpu.sh", "retry", *JOB, **TPU).returncode == 2
    assert words(launcher.calls()) == ATTEMPT


def test_retry_ends_after_so_many_attempts(launcher):
    launcher.answer(status=[[0, "job: exit 1"]], describe=NEW * 3)
    process = launcher.run("tpu.sh", "retry", *JOB, **TPU)
    assert process.returncode == 1
    assert words(launcher.calls()) == ATTEMPT * 3
    assert "attempt 3 of 3" in process.error


def test_an_interrupted_retry_says_what_it_leaves(launcher):
    launcher.answer(status=[[0, "job: running"]], describe=NEW)
    process = launcher.start("tpu.sh", "retry", *JOB, **TPU)
    wait_until(lambda: "job.sh status" in (launcher.bin / "calls").read_text())
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (
        "TPU_NAME=slice ZONE=us-west4-a PROJECT_ID=project launch/tpu.sh delete"
        in error
    )
    assert "delete" not in words(launcher.calls())


def test_the_workers_get_the_arguments_as_they_are(launcher):
    launcher.answer(status=[[0, "job: exit 0"]])
    settings = {"TFDS_DATA_DIR": "gs://bucket/the data"}
    launcher.run("tpu.sh", "run", *JOB, **TPU, **settings)
    launcher.run("xpk.sh", "run", *JOB, **XPK, **settings)
    tpu, xpk = (
        next(word for word in call if word.startswith("--command="))
        for call in (launcher.calls()[0], launcher.calls()[-1])
    )
    environment = ["env", "JAX_PACKAGE=jax[tpu]", "TFDS_DATA_DIR=gs://bucket/the data"]
    worker = ["bash", "dtrak_jax/launch/worker.sh", *JOB]
    start = ["bash", "dtrak_jax/launch/job.sh", "start"]
    assert shlex.split(tpu.partition("=")[2]) == [*environment, *start, *worker]
    worker = ["bash", "launch/worker.sh", *JOB]
    assert shlex.split(xpk.partition("=")[2]) == ["exec", *environment, *worker]


def test_a_job_outlives_the_session_that_started_it(launcher, tmp_path):
    """And is started once; its exit code is kept."""
    line = ["bash", "-c", "until test -e go; do sleep .05; done; echo done; exit 7"]
    assert launcher.run("job.sh", "status").out == "job: none\n"
    session = launcher.start("job.sh", "start", *line)
    session.communicate(timeout=5)
    assert session.returncode == 0
    with pytest.raises(ProcessLookupError):  # nothing of it is left to be killed
        os.killpg(session.pid, signal.SIGKILL)
    assert launcher.run("job.sh", "status").out == "job: running\n"
    assert launcher.run("job.sh", "start", *line).returncode == 0
    other = launcher.run("job.sh", "start", "true")
    assert other.returncode == 2
    assert "another job is running: bash -c 'until" in other.error
    (launcher.project / "go").touch()
    wait_until(lambda: launcher.run("job.sh", "status").out == "job: exit 7\n")
    assert (tmp_path / "home" / "dtrak_jax_job" / "log").read_text() == "done\n"


def test_a_job_that_was_killed_is_lost(launcher):
    launcher.run(
        "job.sh",
        "start",
        "bash",
        "-c",
        "cut -d ' ' -f 6 /proc/self/stat >sid; sleep 60",
    )
    wait_until((launcher.project / "sid").exists)
    wait_until((launcher.project / "sid").read_text)
    os.killpg(int((launcher.project / "sid").read_text()), signal.SIGKILL)
    wait_until(lambda: launcher.run("job.sh", "status").out == "job: lost\n")


def give_uv(launcher, program):
    """A uv that is slow to install `program` as dtrak-jax, and notes that it did."""
    launcher.fake(
        "uv",
        f"""#!{sys.executable} -ES
import json, pathlib, sys, time
line = ["uv", *sys.argv[1:]]
with open({str(launcher.bin / "calls")!r}, "a") as calls:
    calls.write(json.dumps(line) + "\\n")
folder = pathlib.Path({str(launcher.bin.parent / "venv" / "bin")!r})
folder.mkdir(parents=True, exist_ok=True)
time.sleep(0.2)
for name in ["python", "dtrak-jax"]:
    (folder / name).write_text({program!r})
    (folder / name).chmod(0o755)
""",
    )
    return {"JAX_PACKAGE": "jax[tpu]", "VENV": str(launcher.bin.parent / "venv")}


SHOW = '#!/bin/bash\necho "[$DTRAK_DISTRIBUTED] $*"\n[[ $1 != ablate ]] || exit 3\n'


def test_a_worker_runs_its_stages_until_one_fails(launcher):
    settings = give_uv(launcher, SHOW)
    rest = ["configs/digits.py", "--workdir", "gs://bucket/a run"]
    process = launcher.run("worker.sh", "lds,report", *rest, **settings)
    assert process.returncode == 0, process.error
    shown = " ".join(rest)
    assert process.out == f"[1] lds {shown}\n[1] report {shown}\n"
    alone = settings | {"DTRAK_DISTRIBUTED": ""}
    process = launcher.run("worker.sh", "lds,ablate,report", *rest, **alone)
    assert process.returncode == 3
    assert process.out == f"[] lds {shown}\n[] ablate {shown}\n"


def test_workers_that_start_at_once_install_once(launcher):
    """And again only when what is to be installed has changed."""
    settings = give_uv(launcher, SHOW)
    together = [launcher.start("worker.sh", "install", **settings)]
    together += [launcher.start("worker.sh", "install", **settings) for _ in range(2)]
    for process in together:
        process.communicate(timeout=30)
        assert process.returncode == 0
    venv = settings["VENV"]
    made = ["uv", "venv", "--allow-existing", "--python", "3.12", venv]
    installed = ["uv", "pip", "install", "--python", f"{venv}/bin/python"]
    installed += ["--editable", ".[gcp]", "jax[tpu]"]
    assert launcher.calls() == [made, installed]
    with (launcher.project / "setup.cfg").open("a") as file:
        file.write("# another dependency\n")
    assert launcher.run("worker.sh", "install", **settings).returncode == 0
    assert launcher.calls() == [made, installed, installed]
    assert not Path(f"{venv}.lock").exists()


def test_a_worker_looks_again_once_it_may_install(launcher):
    """Another one may have ended just before: here, as this one makes its lock."""
    settings = give_uv(launcher, SHOW)
    launcher.run("worker.sh", "install", **settings)
    note = f"{settings['VENV']}/installed"
    Path(note).rename(f"{note}.late")
    real = shutil.which("mkdir")
    launcher.fake("mkdir", f'#!/bin/bash\nmv {note}.late {note}\n{real} "$@"\n')
    launcher.answer()
    assert launcher.run("worker.sh", "install", **settings).returncode == 0
    assert launcher.calls() == []


def test_a_worker_that_cannot_install_leaves_no_lock(launcher):
    launcher.answer(uv=[[1, "no network"]])
    settings = {"JAX_PACKAGE": "jax", "VENV": str(launcher.bin.parent / "venv")}
    assert launcher.run("worker.sh", *JOB, **settings).returncode == 1
    assert not Path(f"{settings['VENV']}.lock").exists()


def test_a_worker_passes_a_signal_on_and_waits(launcher, tmp_path):
    """The stage saves, exits with 130, and no other stage begins."""
    saves = f"""#!/bin/bash
trap 'sleep .3; echo saved $1; exit 130' TERM
touch {tmp_path}/ready
while :; do sleep .05; done
"""
    process = launcher.start("worker.sh", *JOB, **give_uv(launcher, saves))
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == "saved lds\n"


SLURM_JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_GPUS_ON_NODE": "3",
    "SLURM_CPUS_PER_TASK": "4",
}


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (130, "", True),
        (130, "49", True),
        (130, "50", False),
        (2, "", False),
        (0, "", 0),
    ],
)
def test_a_slurm_job_that_saved_goes_back_into_the_queue(
    launcher, code, restarts, requeued
):
    """Not one with a wrong setting, and not for ever."""
    launcher.answer(srun=[[code, ""]])
    settings = SLURM_JOB | {"SLURM_RESTART_COUNT": restarts}
    process = launcher.run("gpu.sbatch", *JOB, **settings)
    assert process.returncode == code
    step, *then = launcher.calls()
    options = ["--kill-on-bad-exit=0", "--cpus-per-task=4"]
    assert step == ["srun", *options, "bash", "launch/worker.sh", *JOB]
    assert then == [["scontrol", "requeue", "17"]] * requeued


def test_jax_finds_its_peers_and_gpus_under_slurm(launcher):
    """One process on each of two nodes, each with all three GPUs; and again."""
    launcher.fake(
        "srun",
        f"""#!{sys.executable}
import os, subprocess, sys
step = {{"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}}
tasks = [
    subprocess.Popen(sys.argv[3:], env=os.environ | step | {{"SLURM_PROCID": str(i)}})
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
""",
    )
    # The module alone: all of dtrak_jax takes seconds to import.
    program = f"""#!{sys.executable}
import jax, runpy
runpy.run_path({str(ROOT / "dtrak_jax" / "parallel.py")!r})["start"]()
gpus = jax.config.read("jax_cuda_visible_devices")
print(jax.process_index(), jax.process_count(), gpus, flush=True)
"""
    settings = SLURM_JOB | give_uv(launcher, program)
    settings["JAX_PLATFORMS"] = "cpu"
    settings["JAX_COORDINATOR_PORT"] = str(free_port())
    process = launcher.run("gpu.sbatch", *JOB, **settings)
    assert process.returncode == 0, process.error
    lines = sorted(process.out.splitlines())
    assert lines == ["0 2 0,1,2"] * 2 + ["1 2 0,1,2"] * 2
