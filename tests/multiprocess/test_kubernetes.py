"""launch/kubernetes.yaml: Kubernetes' schemas take it, and what its pods run works on hosts.

No cluster is here: a host takes the part of a node, and this test that of the Job's controller,
which gives each pod its index and makes another one where one has ended with 75.
"""

import fnmatch
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from multiprocess.hosts import ROOT, Hosts, send, two_hosts
from multiprocess.job import TIMEOUT_SECONDS, Job, wait_until

from vitscale.guard import ending

MANIFEST = ROOT / "launch" / "kubernetes.yaml"


def resources() -> dict[str, dict[str, Any]]:
    return {resource["kind"]: resource for resource in yaml.safe_load_all(MANIFEST.read_text())}


def test_kubernetes_takes_the_manifest() -> None:
    found = resources()
    assert set(found) == {"Service", "NetworkPolicy", "Job"}
    for resource in found.values():
        kubernetes_validate.validate(resource, "1.37", strict=True)
    job = found["Job"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completions"] == job["parallelism"] == int(environment["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["PROCESSES"])
    assert environment["MASTER_ADDR"] == f"vitscale-0.{pod['subdomain']}"
    assert pod["subdomain"] == found["Service"]["metadata"]["name"]
    assert found["Service"]["spec"]["selector"] == {"job-name": found["Job"]["metadata"]["name"]}
    policy, label = found["NetworkPolicy"]["spec"], {"matchLabels": found["Service"]["spec"]["selector"]}
    assert policy["podSelector"] == label and policy["ingress"] == [{"from": [{"podSelector": label}]}]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    (config, *_) = [word for word in container["args"] if word.endswith(".toml")]
    assert (ROOT / config).exists()


def in_image(path: str) -> bool:
    """Whether `COPY . .` takes a file: the last rule for it or a folder above it counts."""
    taken = True
    parts = path.split("/")
    for rule in (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = rule.removeprefix("!").removeprefix("**/")
        above = parts if "**/" in rule else ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if rule and not rule.startswith("#") and any(fnmatch.fnmatch(name, pattern) for name in above):
            taken = rule.startswith("!")
    return taken


def test_the_image_has_what_a_pod_runs_and_nothing_that_lies_beside_it() -> None:
    (container,) = resources()["Job"]["spec"]["template"]["spec"]["containers"]
    words = " ".join(container["args"]).split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [word for word in words if (ROOT / word).is_file()]
    needed += ["vitscale/models/vit.py", "tools/data.py", "pyproject.toml", "constraints.txt"]
    needed += [project["readme"], *project["license-files"]]
    assert {"launch/train.py", "launch/ended.py"} < set(needed) and all(map(in_image, needed))
    beside = [".deepspeed_env", ".env", ".git/config", "exports/a.safetensors", "imported/a.npz", "runs/a/x"]
    assert not any(map(in_image, [*beside, "vitscale/models/__pycache__/vit.pyc"]))
    assert ".deepspeed_env" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_manifest_that_kubernetes_would_refuse_is_found() -> None:
    job = resources()["Job"]
    job["spec"]["paralelism"] = job["spec"].pop("parallelism")
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_pods_save_when_one_is_asked_to_go_and_their_successors_go_on(
    tmp_path: Path, index: Path, sweep: bool
) -> None:
    if not sweep:
        pytest.skip("with --sweep: two starts of two torchruns")
    job = Job(tmp_path / "job", index)
    with two_hosts(tmp_path / "hosts") as hosts:
        pods = [start_pod(hosts, job, place, "total_steps=1000000") for place in (0, 1)]
        wait_until(job.reached(8), job.output, *pods)
        send(pods[1], signal.SIGTERM)
        assert [pod.wait(TIMEOUT_SECONDS) for pod in pods] == [75, 75], job.output()
        status = ending.read(job.run_dir)
        assert status and status["state"] == "preempted"
        last = status["step"] + 5
        pods = [start_pod(hosts, job, place, f"total_steps={last}") for place in (0, 1)]
        assert [pod.wait(TIMEOUT_SECONDS) for pod in pods] == [2, 2], job.output()  # it may not be shortened
        assert "cannot be shortened" in job.output()
        pods = [start_pod(hosts, job, place, "total_steps=1000000") for place in (0, 1)]
        wait_until(job.reached(last), job.output, *pods)
        for pod in pods:
            send(pod, signal.SIGTERM)
        assert [pod.wait(TIMEOUT_SECONDS) for pod in pods] == [75, 75], job.output()
    assert job.output().count("resumed from") == 1


def start_pod(hosts: Hosts, job: Job, place: int, *overrides: str) -> subprocess.Popen[bytes]:
    """What the container of a pod runs, with one process, on a host of its own."""
    (container,) = resources()["Job"]["spec"]["template"]["spec"]["containers"]
    script, name, *_ = container["args"]
    environment = {
        "NODES": "2",
        "PROCESSES": "1",
        "MASTER_ADDR": "node1",
        "JOB_COMPLETION_INDEX": str(place),
        "PATH": f"{ROOT}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TMPDIR": str(hosts.folder),
    }
    return hosts.start(
        place + 1, [*container["command"], script, name, job.config, *overrides], job.log, environment
    )
