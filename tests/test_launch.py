"""The templates in launch/: parsed, and run with schedulers of a few lines in their place; the Dockerfile."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kdjax import cli
from tests.shared import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RUN = ["--config=quickstart", "--workdir=/shared/a run"]


def programs(folder, **scripts):
    """Programs of a few lines of bash that stand for others in the PATH."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "OUT": str(folder / "out")}


def out(tmp_path):
    return (tmp_path / "out").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if checker is None:
        pytest.skip("shellcheck is missing: make setup installs it")
    said = subprocess.run([checker, script], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


def parsed(words):
    """The flags of a command `kdjax train ...`, as kdjax reads them."""
    assert words[0] == "train"
    known, rest = cli._parser()[0].parse_known_args(words)
    assert all(word.startswith("--config.") for word in rest)
    return vars(known)


SAYS = r'printf "%s\n" "$@" >>$OUT; exit ${CODE:-0}'


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, 0, True), (143, 3, True), (137, 0, True), (2, 0, False), (130, 0, False), (75, 20, False)],
)
def test_slurm(tmp_path, code, restarts, requeued):
    """srun runs what follows its own flags; the job is queued again after a lost host or a preemption."""
    srun = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    env = programs(tmp_path, srun=srun, kdjax=SAYS, scontrol='echo "scontrol $*" >>$OUT')
    env |= dict(CODE=str(code), SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    assert subprocess.run([LAUNCH / "slurm.sh", *RUN], env=env, stdout=subprocess.DEVNULL).returncode == code
    words, said = out(tmp_path)[:4], out(tmp_path)[4:]
    flags = parsed(words)
    assert flags["multihost"] and flags["workdir"] == "/shared/a run" and flags["coordinator"] == ""
    assert said == ["scontrol requeue 7"] * requeued
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == "1" and options["signal"] == "TERM@120" and "requeue" in options


def test_ssh(tmp_path):
    """Each host is told its number; the largest code is that of the script."""
    ssh = 'export NODE=$1; shift; bash -c "$*"'
    kdjax = 'printf "%s|" $NODE "$@" >>$OUT.$NODE; [ $NODE = b ] && exit 75; exit 0'
    env = programs(tmp_path, ssh=ssh, kdjax=kdjax) | dict(HOSTS="a b", PORT="99")
    assert subprocess.run([LAUNCH / "ssh.sh", *RUN], env=env).returncode == 75
    for number, node in enumerate("ab"):
        name, *words = (tmp_path / f"out.{node}").read_text().strip("|").split("|")
        assert name == node and words[:3] == ["supervise", "--", "kdjax"]
        flags = parsed(words[3:])
        assert (flags["coordinator"], flags["hosts"], flags["host"]) == ("a:99", 2, number)
        assert flags["workdir"] == "/shared/a run"
    assert not [*tmp_path.glob(".kdjax-*")]


def test_ssh_stops_all_hosts_on_sigterm(tmp_path):
    ssh = 'export NODE=$1; shift; bash -c "$*"'
    kdjax = "trap 'exit 143' TERM; echo >$OUT.$NODE; while true; do sleep 0.05; done"
    env = programs(tmp_path, ssh=ssh, kdjax=kdjax) | dict(HOSTS="a b")
    process = subprocess.Popen([LAUNCH / "ssh.sh", *RUN], env=env)
    while not all((tmp_path / f"out.{node}").exists() for node in "ab"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_tpu_pod(tmp_path):
    env = programs(tmp_path, gcloud=SAYS, kdjax=SAYS) | dict(TPU="slice", ZONE="z")
    subprocess.run([LAUNCH / "tpu_pod.sh", *RUN], env=env, check=True)
    said = out(tmp_path)
    assert said[:-1] == "compute tpus tpu-vm ssh slice --zone=z --worker=all".split()
    (tmp_path / "out").unlink()
    subprocess.run(["bash", "-c", said[-1].removeprefix("--command=")], env=env, check=True)
    assert out(tmp_path)[:3] == ["supervise", "--", "kdjax"]
    assert parsed(out(tmp_path)[3:])["multihost"]


def test_jobset():
    jobset, policy = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, [job] = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a policy on exit codes needs it
    [container] = pod["containers"]
    [rule] = spec["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert codes["containerName"] == container["name"] and not {75, 137, 143} & set(codes["values"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    words = [*container["command"], *container["args"]]
    assert words.pop(0) == "kdjax"
    values = {variable["name"]: "1" for variable in container["env"]}
    flags = parsed([re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in words])
    host, port = flags["coordinator"].split(":")
    assert host == f"{name}-{job['name']}-0-0.{name}" and jobset["spec"]["network"]["enableDNSHostnames"]
    assert int(port) == container["ports"][0]["containerPort"] == int(flags["bind"].split(":")[1])
    assert (flags["hosts"], flags["host"]) == (spec["parallelism"], 1)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    label = {"jobset.sigs.k8s.io/jobset-name": name}
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["podSelector"]["matchLabels"] == label


def test_the_dockerfile_is_sound_and_its_files_are_there():
    file = ROOT / "Dockerfile"
    lines = file.read_text().splitlines()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() and name.split("/")[0] in allowed for name in copied)
    [python] = [line.removeprefix("FROM python:").split("-")[0] for line in lines if line.startswith("FROM ")]
    [constraints] = [name for name in copied if name.startswith("constraints/")]
    assert constraints == f"constraints/py{python.replace('.', '')}.txt"
    checker = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if checker is None:
        pytest.skip("hadolint is missing: make setup installs it")
    said = subprocess.run([checker, file], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr


def test_the_devcontainer_installs_with_a_target_of_the_makefile():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    make, target = settings["postCreateCommand"].split()
    assert make == "make" and f"\n{target}: " in (ROOT / "Makefile").read_text()
