"""cluster.yaml and deploy/ against Ray's, EC2's and KubeRay's own rules and ours; the commands that are written down.

Nothing here needs a cloud, a network or a running Ray.
"""

import copy
import functools
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import click
import jsonschema
import pytest
import tyro
import yaml
from botocore.validate import ParamValidator
from kuberay import RAY_JOB
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.scripts.scripts import cli as ray_commands

from miner.config import Config

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = ("cluster.yaml", "deploy/gcp.yaml", "deploy/onprem.yaml")
CLOUDS = CLUSTERS[:2]
RAY_JOB_FILE = "deploy/rayjob.yaml"
PAPERS = (*CLUSTERS, RAY_JOB_FILE, "deploy/Dockerfile", "docs/cluster.md")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
IMAGE = re.compile(r"(rayproject/ray|registry\.example\.com/outlier-miner):\d+\.\d+\.\d+-py311-(cpu|cu\d+)")

Parsed = dict[str, Any]


def load(name: str) -> Parsed:
    """One of the files, parsed."""
    return dict(yaml.safe_load((ROOT / name).read_text()))


@functools.cache
def run_instances() -> Any:
    """What EC2's RunInstances takes, as botocore knows it."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def commands(config: Parsed) -> list[str]:
    """Every shell command of a cluster file."""
    found = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    for node_type in config.get("available_node_types", {}).values():
        found += [command for key, value in node_type.items() if key.endswith("_commands") for command in value]
    return found


def faults(raw: Parsed) -> list[str]:
    """What is wrong with a cluster file: Ray's merge with its defaults and its schema first, then our rules."""
    try:
        config = prepare_config(copy.deepcopy(raw))
        validate_config(config)
    except (jsonschema.ValidationError, TypeError, ValueError, click.ClickException) as error:
        return [f"schema: {str(error).splitlines()[0]}"]
    checks = [_start_faults, _token_faults, _money_faults, _node_faults, _image_faults, _mount_faults]
    return [fault for check in checks for fault in check(config)]


def _start_faults(config: Parsed) -> Iterator[str]:
    head = " ".join(config["head_start_ray_commands"])
    if "--dashboard-host=127.0.0.1" not in head or "0.0.0.0" in head:
        yield "dashboard: not on 127.0.0.1 only"
    for key in STARTS:
        start = config[key][-1]
        if not start.startswith("unset OMP_NUM_THREADS;") or "ray start" not in start:
            yield f"threads: {key} leaves OMP_NUM_THREADS=1"
    for command in commands(config):
        if command.lstrip().startswith("("):
            yield f"shell: Ray puts ( ) around a command, and (( )) is arithmetic: {command}"
        if "ray-wheels" in command:
            yield f"setup: {command}"


def _token_faults(config: Parsed) -> Iterator[str]:
    docker = config.get("docker", {})
    for key in STARTS:
        words = shlex.split(" ".join([*docker.get("run_options", []), config[key][-1]]))
        said = dict(word.split("=", 1) for word in words if word.startswith("RAY_AUTH"))
        if said.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN_PATH" not in said or "RAY_AUTH_TOKEN" in said:
            yield f"token: {key} does not ask for one"
    # prepare_config merges the common commands into the head's and the workers' own.
    setups = {"head": config["head_setup_commands"], "workers": config["worker_setup_commands"]}
    for name, node_type in config["available_node_types"].items():
        setups[name] = node_type.get("worker_setup_commands") or config["worker_setup_commands"]
    for name, setup in setups.items():
        if not any(command.startswith("umask 077 && ") and "auth_token" in command for command in setup):
            yield f"token: {name} does not keep it to itself"


def _money_faults(config: Parsed) -> Iterator[str]:
    if config["provider"]["type"] == "local":
        return
    if config["idle_timeout_minutes"] > 15:
        yield "money: idle nodes stay"
    if config["provider"]["type"] == "aws" and config["provider"].get("cache_stopped_nodes", True):
        yield "money: stopped nodes keep their disks"
    for name, node_type in config["available_node_types"].items():
        if node_type["min_workers"] != 0:
            yield f"money: {name} starts before anybody asks"
    head = config["available_node_types"][config["head_node_type"]]
    if head["resources"].get("CPU") != 0 or "--num-cpus=0" not in config["head_start_ray_commands"][-1]:
        yield "head: takes work"


def _node_faults(config: Parsed) -> Iterator[str]:
    if config["provider"]["type"] != "aws":
        return
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, run_instances())
        if report.has_errors():
            yield f"ec2: {name}: {report.generate_report()}"
        if not re.fullmatch("ami-[0-9a-f]{17}", str(node.get("ImageId"))):
            yield f"ec2: {name} takes Ray's own image"
        if not all(re.fullmatch("sg-[0-9a-f]{17}", group) for group in node.get("SecurityGroupIds", ["none"])):
            yield f"ssh: {name} takes a security group of Ray's, which is open to the world"


def _image_faults(config: Parsed) -> Iterator[str]:
    docker = config.get("docker", {})
    images = [docker[key] for key in ("image", "head_image", "worker_image") if key in docker]
    for node_type in config["available_node_types"].values():
        images += [value for key, value in node_type.get("docker", {}).items() if key == "worker_image"]
    if docker and not images:
        yield "image: none named"
    for image in images:
        if not IMAGE.fullmatch(image):
            yield f"image: {image} is not pinned"
    for command in commands(config):
        if (
            "pip install" in command
            and "/outlier-miner[" in command.replace('"', "")
            and "ray[default]==" not in command
        ):
            yield f"image: Ray's version is free in {command}"


def _mount_faults(config: Parsed) -> Iterator[str]:
    for there, here in config["file_mounts"].items():
        if here != "." and not here.startswith("~/"):
            yield f"mount: {there} is {here}, which is one machine's path"
    if ".gitignore" not in config["rsync_filter"]:
        yield "mount: environments, runs and pools would be sent along"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_file_keeps_the_rules(name: str) -> None:
    assert faults(load(name)) == []


def put(path: str, value: Any) -> Callable[[Parsed], None]:
    """A change: ``value`` at a path with dots."""

    def change(config: Parsed) -> None:
        *way, last = path.split(".")
        for step in way:
            config = config[step]
        config[last] = value

    return change


def drop(path: str) -> Callable[[Parsed], None]:
    """A change: what lies at a path with dots is gone."""

    def change(config: Parsed) -> None:
        *way, last = path.split(".")
        for step in way:
            config = config[step]
        del config[last]

    return change


def replace(old: str, new: str) -> Callable[[Parsed], None]:
    """A change: other text in all commands and Docker options."""

    def change(config: Parsed) -> None:
        parts = [config, *config["available_node_types"].values(), config["docker"]]
        for part in parts:
            for key, value in part.items():
                if key.endswith("_commands") or key == "run_options":
                    assert isinstance(value, list)
                    part[key] = [text.replace(old, new) for text in value]

    return change


MUTATIONS = {
    "a misspelt key": (put("setup_command", []), "schema"),
    "a misspelt key of a node type": (put("available_node_types.pool_cpu.max_worker", 1), "schema"),
    "a misspelt key of docker": (put("docker.pull", True), "schema"),
    "half a CPU": (put("available_node_types.pool_cpu.resources.CPU", 1.5), "schema"),
    "a negative GPU": (put("available_node_types.trainer_gpu.resources.GPU", -1), "schema"),
    "a number in words": (put("max_workers", "eight"), "schema"),
    "no resources": (drop("available_node_types.pool_cpu.resources"), "schema"),
    "more at least than at most": (put("available_node_types.pool_cpu.min_workers", 99), "schema"),
    "no head": (drop("head_node_type"), "schema"),
    "a setup of one type only in the wrong place": (put("available_node_types.pool_cpu.setup_commands", []), "schema"),
    "a misspelt EC2 field": (put("available_node_types.pool_cpu.node_config.InstanceTyp", "m7i.large"), "ec2"),
    "an EC2 field of another type": (put("available_node_types.head.node_config.ImageId", 7), "ec2"),
    "Ray's own AMI": (drop("available_node_types.head.node_config.ImageId"), "ec2"),
    "Ray's own security group": (drop("available_node_types.pool_cpu.node_config.SecurityGroupIds"), "ssh"),
    "Ray's own start command": (drop("head_start_ray_commands"), "dashboard"),
    "a dashboard for everybody": (replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"), "dashboard"),
    "one thread": (replace("unset OMP_NUM_THREADS; ", ""), "threads"),
    "no token": (replace("-e RAY_AUTH_MODE=token", ""), "token"),
    "a token in the open": (replace("TOKEN_PATH=/home/ray/.auth_token", "TOKEN=abc"), "token"),
    "a token for all to read": (replace("umask 077 && ", ""), "token"),
    "Ray's own setup": (drop("setup_commands"), "setup"),
    "a free Ray": (replace("ray[default]==2.60.0", "ray[default]"), "image"),
    "a moving image": (put("docker.image", "rayproject/ray:latest-py311-cpu"), "image"),
    "a dead image": (put("available_node_types.trainer_gpu.docker.worker_image", "rayproject/ray-ml:2.9.0"), "image"),
    "nodes that nobody asked for": (put("available_node_types.trainer_gpu.min_workers", 1), "money"),
    "idle nodes": (put("idle_timeout_minutes", 600), "money"),
    "stopped nodes": (drop("provider.cache_stopped_nodes"), "money"),
    "a head that works": (put("available_node_types.head.resources.CPU", 8), "head"),
    "a path of one machine": (put("file_mounts./home/ray/x", "/srv/me/outlier-miner"), "mount"),
    "everything sent along": (put("rsync_filter", []), "mount"),
    "arithmetic": (replace("umask 077", "(umask 077"), "shell"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_found(name: str) -> None:
    change, kind = MUTATIONS[name]
    config = copy.deepcopy(load("cluster.yaml"))
    change(config)
    assert kind in {fault.split(":")[0] for fault in faults(config)}


def test_the_files_agree_on_versions() -> None:
    text = "\n".join((ROOT / name).read_text() for name in PAPERS)
    found = re.findall(r"(?:/ray:|outlier-miner:|ray\[default\]==|rayVersion: \")(\d+\.\d+\.\d+)", text)
    assert len(found) > 20
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", PAPERS)
def test_nothing_of_this_machine_is_written_down(name: str) -> None:
    text = (ROOT / name).read_text()
    for place in (str(ROOT), str(Path.home()) + "/", os.environ.get("TMPDIR", str(ROOT))):
        assert place not in text
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|aws_secret|\b[0-9a-f]{40,}\b", text)
    assert "0.0.0.0" not in re.sub(r"#.*", "", text) or name.endswith(".md")


def test_extras_and_packages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = set()
    for name in CLUSTERS:
        for command in commands(load(name)):
            asked |= set(re.findall(r"/outlier-miner\[(\w+)\]", command))
    assert asked == {"cpu", "gpu"} <= set(extras)
    copied = re.findall(r"^COPY --chown=ray (.+) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
    sources = [source for words in copied for source in words.split()]
    assert all((ROOT / source).exists() for source in sources)
    assert set(project["tool"]["setuptools"]["packages"]) <= set(sources)


# What a job asks for, and the nodes that come.


def nodes_for(config: Parsed, trainers: int, pools: int) -> tuple[dict[str, int], int]:
    """The nodes that Ray's autoscaler would start for so many actors, and how many actors no node could take."""
    settings = AutoscalingConfig(config, skip_content_hash=True)
    bundles = [{"GPU": 1, "CPU": 1}] * trainers + [{"CPU": 1}] * pools
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=settings.get_node_type_configs(),
        max_num_nodes=settings.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each) for each in bundles]),
    )
    reply = ResourceDemandScheduler().schedule(request)
    started = {launch.instance_type.replace("_", "-"): launch.count for launch in reply.to_launch}
    return started, len(reply.infeasible_resource_requests)


def prepared(name: str) -> Parsed:
    """A file as the autoscaler sees it."""
    if name in CLOUDS:
        return dict(prepare_config(load(name)))
    metadata = {"name": "cluster", "namespace": "default"}
    return dict(
        _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": load(name)["spec"]["rayClusterSpec"]})
    )


@pytest.mark.parametrize("name", [*CLOUDS, RAY_JOB_FILE])
def test_actors_bring_the_nodes_that_are_meant_for_them(name: str) -> None:
    config = prepared(name)
    assert nodes_for(config, 0, 0) == ({}, 0)
    assert nodes_for(config, 1, 0) == ({"trainer-gpu": 1}, 0)
    assert nodes_for(config, 0, 1) == ({"pool-cpu": 1}, 0)
    assert nodes_for(config, 2, 16) == ({"trainer-gpu": 2, "pool-cpu": 1}, 0)
    assert nodes_for(config, 4, 64) == ({"trainer-gpu": 4, "pool-cpu": 4}, 0)
    assert nodes_for(config, 5, 64) == ({"trainer-gpu": 4, "pool-cpu": 4}, 1)


# Kubernetes.


def job_faults(job: Parsed) -> list[str]:
    """What is wrong with a RayJob: KubeRay's field names first, then our rules."""
    errors = [error.message for error in jsonschema.Draft202012Validator(RAY_JOB).iter_errors(job)]
    if errors:
        return [f"schema: {error}" for error in errors]
    spec, found = job["spec"], []
    cluster = spec["rayClusterSpec"]
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("token")
    if not cluster.get("enableInTreeAutoscaling") or cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 900:
        found.append("money")
    if not spec.get("shutdownAfterJobFinishes") or "activeDeadlineSeconds" not in spec:
        found.append("money")
    if cluster["headGroupSpec"].get("serviceType") != "ClusterIP" or cluster["headGroupSpec"].get("enableIngress"):
        found.append("open")
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        found.append("head")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    if any(group.get("minReplicas", 0) or group.get("replicas", 0) for group in groups):
        found.append("money")
    for group in groups:
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        if not IMAGE.fullmatch(container["image"]) or cluster["rayVersion"] not in container["image"]:
            found.append("image")
        if {mount["name"] for mount in container["volumeMounts"]} - {volume["name"] for volume in pod["volumes"]}:
            found.append("mount")
    return found


def test_the_ray_job_keeps_the_rules() -> None:
    assert job_faults(load(RAY_JOB_FILE)) == []


CLUSTER = "spec.rayClusterSpec"
JOB_MUTATIONS = {
    "a misspelt field": (put("spec.shutdownAfterJobFinish", True), "schema"),
    "a field one level too high": (put("spec.authOptions", {"mode": "token"}), "schema"),
    "a number for a text": (put(f"{CLUSTER}.headGroupSpec.rayStartParams", {"num-cpus": 0}), "schema"),
    "a text for a number": (put("spec.backoffLimit", "2"), "schema"),
    "no head": (drop(f"{CLUSTER}.headGroupSpec"), "schema"),
    "an unknown mode": (put(f"{CLUSTER}.authOptions", {"mode": "password"}), "schema"),
    "no token": (drop(f"{CLUSTER}.authOptions"), "token"),
    "a cluster that stays": (put("spec.shutdownAfterJobFinishes", False), "money"),
    "no autoscaling": (put(f"{CLUSTER}.enableInTreeAutoscaling", False), "money"),
    "a public head": (put(f"{CLUSTER}.headGroupSpec.serviceType", "LoadBalancer"), "open"),
    "another Ray": (put(f"{CLUSTER}.rayVersion", "2.59.0"), "image"),
    "a head that works": (put(f"{CLUSTER}.headGroupSpec.rayStartParams", {}), "head"),
}


@pytest.mark.parametrize("name", JOB_MUTATIONS)
def test_a_mistake_in_the_ray_job_is_found(name: str) -> None:
    change, kind = JOB_MUTATIONS[name]
    job = copy.deepcopy(load(RAY_JOB_FILE))
    change(job)
    assert kind in {fault.split(":")[0] for fault in job_faults(job)}


# The commands that are written down.


def written(name: str) -> list[str]:
    """The shell of a page's bash blocks, or of a file's heading comment."""
    text = (ROOT / name).read_text()
    if name.endswith(".md"):
        return re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    heading = "".join(re.findall(r"\A(?:#.*\n)+", text))
    return ["\n".join(re.findall(r"^#   (.+)", heading, re.M))]


def parse_words(words: list[str]) -> str | None:
    """Parse a command as its own program does, running nothing; its name, or None if it is none of Ray's or ours."""
    if words[0] == "ray":
        command: Any = ray_commands
        rest = words[1:]
        while isinstance(command, click.Group):
            name, *rest = rest
            command = command.get_command(click.Context(command), name)
            assert command is not None, words
        with command.make_context(name, rest, resilient_parsing=False) as context:
            inner = context.params.get("entrypoint") or ()
        return parse_words(list(inner)) or name if inner else name
    if words[:2] == ["python", "-m"] and words[2] == "pipelines.resample":
        tyro.cli(Config, args=words[3:])
        return words[2]
    return None


def simple_commands(shell: str) -> Iterator[list[str]]:
    """The commands of a script, one a line or between ``;`` and ``&&``, that begin with ray or python."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|<>"):
                if words and words[0] in ("ray", "python"):
                    yield words
                words = []
            else:
                words.append(word)


@pytest.mark.parametrize("name", PAPERS)
def test_the_written_commands_are_real(name: str) -> None:
    scripts = written(name)
    assert any(scripts)
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
    parsed = [parse_words(words) for script in scripts for words in simple_commands(script)]
    if name in (*CLUSTERS, "docs/cluster.md"):
        assert {"up", "dashboard", "pipelines.resample", "down"} <= set(parsed)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_nodes_commands_are_real(name: str) -> None:
    config = load(name)
    for command in commands(config):
        subprocess.run(["bash", "-n", "-c", f"true && ({command})"], check=True)
    for key in STARTS:
        *_, words = simple_commands(config[key][-1].replace("$RAY_HEAD_IP", "192.0.2.1"))
        assert parse_words(words) == "start"


def test_a_wrong_flag_would_be_noticed() -> None:
    with pytest.raises(click.ClickException, match="dashbord"):
        parse_words(["ray", "start", "--head", "--dashbord-host=127.0.0.1"])
    with pytest.raises(SystemExit):
        parse_words(shlex.split("ray job submit -- python -m pipelines.resample --trainer-count 2"))


def test_the_ray_jobs_command_is_real() -> None:
    assert parse_words(shlex.split(load(RAY_JOB_FILE)["spec"]["entrypoint"])) == "pipelines.resample"


@pytest.mark.parametrize("name", CLOUDS)
def test_a_node_keeps_its_token_to_itself(name: str, tmp_path: Path) -> None:
    """The very command, with a token that any user could read, another place, and no sudo."""
    (tmp_path / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "sudo").chmod(0o755)
    mounted = tmp_path / "home/ray/.outlier-miner/auth_token"
    mounted.parent.mkdir(parents=True)
    mounted.write_text("secret")
    mounted.chmod(0o644)
    command = next(each for each in load(name)["setup_commands"] if "auth_token" in each)
    moved = command.replace("/home/ray", str(tmp_path / "home/ray"))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", f"true && ({moved})"], check=True, env=os.environ | {"PATH": path})
    kept = tmp_path / "home/ray/.auth_token"
    assert kept.read_text() == "secret"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert f"RAY_AUTH_TOKEN_PATH=/home/ray/{kept.name}" in " ".join(load(name)["docker"]["run_options"])
