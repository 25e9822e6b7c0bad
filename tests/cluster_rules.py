"""What must hold for the files in cluster/ that Ray's launcher reads; each check takes the parsed file.

All of them return faults, each as `place: what is wrong`.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import click
import googleapiclient
import jsonschema
import ray
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.cluster.submit import STOP_S

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
_DIGEST = r"(@sha256:[0-9a-f]{64})?"
IMAGE = (
    rf"(rayproject/ray:{re.escape(ray.__version__)}-py3\d+|\S+/u2pl-ray:{re.escape(ray.__version__)})(-gpu)?{_DIGEST}"
)
DRIVER = 580
"""Of NVIDIA, the least for CUDA 13, which the pinned torch is built for."""
LOCAL_DISKS = {"g2-standard-24": 2, "g2-standard-48": 4, "g2-standard-96": 8, "a2-highgpu-4g": 4, "a2-highgpu-8g": 8}
"""How many a machine type of Compute Engine takes if it takes any; from memory of Google's table."""
STOP_WAIT = f"RAY_JOB_STOP_WAIT_TIME_S={STOP_S}"
"""What the head's environment says to Ray, for jobs that plain `ray job submit` has sent."""
_SCOPE = "https://www.googleapis.com/auth"
GCP_WORKER = {"u2pl-worker": {f"{_SCOPE}/devstorage.read_write"}}
GCP_HEAD = {"u2pl-head": {f"{_SCOPE}/devstorage.read_write", f"{_SCOPE}/compute"}}
DELETE = object()

Document = dict[str, Any]
Faults = list[str]


def load(name: str) -> Document:
    """A file of cluster/, read as Ray reads it."""
    return yaml.safe_load((CLUSTER / name).read_text())


def mutated(document: Document, path: str, value: Any) -> Document:
    """A copy with one place set, made, or deleted (`DELETE`); slashes part keys, numbers are places in lists.

    A function as value makes the new value from the old one.
    """
    result = copy.deepcopy(yaml.safe_load(json.dumps(document)))  # aliases of the file are parted
    *parents, last = [int(each) if each.isdigit() else each for each in path.split("/")]
    place: Any = result
    for each in parents:
        place = place[each]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value(place[last]) if callable(value) else value
    return result


def schema_faults(document: Document) -> Faults:
    """What `ray up` itself refuses before it starts anything."""
    try:
        validate_config(prepare_config(copy.deepcopy(document)))
    except jsonschema.ValidationError as error:
        return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}"]
    # what Ray raises where a head type or a docker image is missing, or the provider is none that it knows
    except (AssertionError, ValueError, RuntimeError, KeyError, click.ClickException) as error:
        return [f"ray up: {error}"]
    return []


@cache
def _run_instances() -> Any:
    service = botocore.session.get_session().get_service_model("ec2")
    return service.operation_model("RunInstances").input_shape


def aws_faults(document: Document) -> Faults:
    """Keys and types that EC2's RunInstances does not know."""
    faults = []
    for name, kind in document["available_node_types"].items():
        values = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(values, _run_instances()).generate_report()
        faults += [f"available_node_types/{name}/node_config: {line}" for line in report.splitlines()]
    return faults


@cache
def _compute() -> Mapping[str, Any]:
    folder = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    return json.loads((folder / "compute.v1.json").read_text())["schemas"]


def gcp_faults(document: Document) -> Faults:
    """Keys, types and words that Compute Engine's instances.insert does not know."""
    return [
        fault
        for name, kind in document["available_node_types"].items()
        for fault in _google(kind["node_config"], {"$ref": "Instance"}, f"available_node_types/{name}/node_config")
    ]


def _google(value: Any, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    schema = _compute()[schema["$ref"]] if "$ref" in schema else schema
    kinds = {"object": dict, "array": list, "string": (str, int), "integer": int, "boolean": bool}
    if not isinstance(value, kinds[schema["type"]]) or (schema["type"] == "string" and isinstance(value, bool)):
        yield f"{place}: {value!r} is no {schema['type']}"
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _google(each, schema["items"], f"{place}/{number}")
    elif isinstance(value, dict) and "properties" in schema:
        for key, each in value.items():
            if key in schema["properties"]:
                yield from _google(each, schema["properties"][key], f"{place}/{key}")
            else:
                yield f"{place}/{key}: unknown"
    elif value not in schema.get("enum", [value]):
        yield f"{place}: {value!r} is none of {', '.join(schema['enum'])}"


def common_faults(document: Document) -> Faults:
    """Our own rules for every file of the launcher."""
    faults = []
    for place in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = document.get(place, [])
        starts = [each for each in commands if re.search(r"\bray start\b", each)]
        faults += [f"{place}: `ray start` must come once"] * (len(starts) != 1)
        faults += [
            f"{place}: `{words}` without RAY_AUTH_MODE=token"
            for words in ("ray start", "spot_watcher.py")
            for each in commands
            if words in each and not re.search(r"export [^;]*\bRAY_AUTH_MODE=token\b", each.partition(words)[0])
        ]
        faults += [f"{place}: files per process not raised" for each in starts if "ulimit -n 65536" not in each]
    for each in document.get("head_start_ray_commands", []):
        if "ray start" in each:
            faults += ["head_start_ray_commands: work on the head"] * ("--num-cpus=0" not in each)
            faults += [f"head_start_ray_commands: without {STOP_WAIT} a stopped job cannot write a checkpoint"] * (
                not re.search(rf"export [^;]*\b{STOP_WAIT}\b", each)
            )
            faults += ["head_start_ray_commands: dashboard not on loopback"] * (
                "--dashboard-host=127.0.0.1" not in each
            )
    mounts = document.get("file_mounts", {})
    faults += ["file_mounts: no token"] * ("~/.ray/auth_token" not in mounts)
    faults += [f"file_mounts/{remote}: {local} is not there" for remote, local in mounts.items()
               if not local.startswith("~") and not (ROOT / local).exists()]  # fmt: skip
    modes = [each for each in document.get("setup_commands", []) if "chmod 600 ~/.ray/auth_token" in each]
    faults += ["setup_commands: token not of mode 600"] * (not modes)
    locked = "--require-hashes --requirement ~/u2pl-ray/cluster/requirements.lock"
    installs = [each for each in document.get("setup_commands", []) if "pip install" in each]
    return faults + ["setup_commands: packages without hashes"] * (not all(locked in each for each in installs))


def cloud_faults(document: Document) -> Faults:
    """Our own rules for clusters of machines that are rented."""
    kinds, head = document["available_node_types"], document["head_node_type"]
    faults = []
    if document.get("max_workers", 0) < sum(kind.get("max_workers", 0) for kind in kinds.values()):
        faults.append("max_workers: fewer than the node types may have together")
    if not 0 < document.get("idle_timeout_minutes", 0) <= 60:
        faults.append("idle_timeout_minutes: idle machines are to go within the hour")
    if kinds[head]["resources"].get("CPU") != 0 or "GPU" in kinds[head]["resources"]:
        faults.append(f"available_node_types/{head}/resources: the head is to have none")
    for name, kind in kinds.items():
        if name != head:
            least, most = kind.get("min_workers"), kind.get("max_workers")
            if least is None or most is None or not 0 <= least <= most or most == 0:
                faults.append(f"available_node_types/{name}: min_workers {least}, max_workers {most}")
    if not any("GPU" in kind["resources"] for kind in kinds.values()):
        faults.append("available_node_types: no GPU")
    spot = max((kind.get("priority", 0) for name, kind in kinds.items() if name.endswith("spot")), default=0)
    if any(kind.get("priority", 0) >= spot for name, kind in kinds.items() if not name.endswith("spot")):
        faults.append("available_node_types: spot nodes are not the first choice")
    zones = str(document["provider"].get("availability_zone", "")).split(",")
    if len(zones) != 1 or not re.search(r"[a-z]-?[a-z0-9]", zones[0]):
        faults.append("provider/availability_zone: one zone, so that GPU groups do not talk across zones")
    if document["provider"].get("cache_stopped_nodes") is not False:
        faults.append("provider/cache_stopped_nodes: stopped nodes keep costing")
    return faults + _docker_faults(document.get("docker", {})) + _scratch_faults(document)


def _docker_faults(docker: Mapping[str, Any]) -> Faults:
    faults = []
    for role in ("head", "worker"):
        image = docker.get(f"{role}_image") or docker.get("image") or ""
        faults += [f"docker/{role}_image: {image!r} is not pinned to Ray {ray.__version__}"] * (
            not re.fullmatch(IMAGE, image)
        )
        options = " ".join([*docker.get("run_options", []), *docker.get(f"{role}_run_options", [])])
        faults += [f"docker/{role}_run_options: no {each}" for each in ("--shm-size=", "--ulimit=nofile=")
                   if each not in options]  # fmt: skip
    if not re.search(rf"-gpu{_DIGEST}$", docker.get("worker_image") or docker.get("image", "")):
        faults.append("docker/worker_image: no GPU image")
    return faults


def _scratch_faults(document: Document) -> Faults:
    start = " ".join(document.get("worker_start_ray_commands", []))
    spill = re.search(r"--object-spilling-directory=(/[\w/]+)", start)
    if spill is None:
        return ["worker_start_ray_commands: no --object-spilling-directory"]
    folder = "/".join(spill[1].split("/")[:3])
    made = " ".join(document.get("initialization_commands", []))
    faults = ["initialization_commands: no scratch disk"] * (not ("mkfs" in made and f"mkdir -p {folder}" in made))
    mounted = " ".join(document.get("docker", {}).get("worker_run_options", []))
    return faults + ["docker/worker_run_options: no scratch folder"] * (f"--volume={folder}:{folder}" not in mounted)


def aws_rule_faults(document: Document) -> Faults:
    """Our own rules for EC2."""
    faults = []
    head = document["head_node_type"]
    for name, kind in document["available_node_types"].items():
        config, place = kind["node_config"], f"available_node_types/{name}/node_config"
        wanted: dict[str, Callable[[], bool]] = {
            "IamInstanceProfile": lambda c=config: "Name" in c["IamInstanceProfile"],
            "MetadataOptions": lambda c=config: c["MetadataOptions"]["HttpTokens"] == "required",
            "SecurityGroupIds": lambda c=config: len(c["SecurityGroupIds"]) > 0,  # else Ray opens ssh to the world
            "ImageId": lambda c=config: re.fullmatch(r"ami-([0-9a-f]+|FILL-IN)", c["ImageId"]) is not None,
            "BlockDeviceMappings": lambda c=config: all(
                each["Ebs"]["Encrypted"] is True and each["Ebs"]["VolumeType"] == "gp3"
                for each in c["BlockDeviceMappings"]
            ),
            "InstanceMarketOptions": lambda c=config, n=name: (
                (c.get("InstanceMarketOptions", {}).get("MarketType") == "spot") == n.endswith("spot")
            ),
        }
        for key, holds in wanted.items():
            try:
                faults += [f"{place}/{key}: not as it must be"] * (not holds())
            except (KeyError, TypeError):
                faults.append(f"{place}/{key}: missing or incomplete")
    profiles = {
        str(kind["node_config"].get("IamInstanceProfile")): name == head
        for name, kind in document["available_node_types"].items()
    }
    if len(profiles) < 2:
        faults.append("available_node_types: workers have the head's rights")
    if "security_group" in document["provider"]:
        faults.append("provider/security_group: Ray adds ssh from 0.0.0.0/0 to any group that it makes")
    return faults + _watcher_faults(document, "aws")


def gcp_rule_faults(document: Document) -> Faults:
    """Our own rules for Compute Engine."""
    faults = []
    for name, kind in document["available_node_types"].items():
        config, place = kind["node_config"], f"available_node_types/{name}/node_config"
        scheduling = config.get("scheduling", {})
        if (scheduling.get("provisioningModel") == "SPOT") != name.endswith("spot"):
            faults.append(f"{place}/scheduling: not as its name says")
        if "GPU" in kind["resources"] and scheduling.get("onHostMaintenance") != "TERMINATE":
            faults.append(
                f"{place}/scheduling: machines with GPUs cannot be moved, onHostMaintenance is to be TERMINATE"
            )
        if "GPU" in kind["resources"]:
            faults += _google_gpu_faults(config, place)
        if any("/family/" in str(disk.get("initializeParams", {}).get("sourceImage")) for disk in config["disks"]):
            faults.append(f"{place}/disks: a family, whose newest image each node would take")
        wanted = GCP_HEAD if name == document["head_node_type"] else GCP_WORKER
        accounts = {each["email"].partition("@")[0]: {*each["scopes"]} for each in config.get("serviceAccounts", [])}
        if accounts != wanted:
            faults.append(f"{place}/serviceAccounts: not {next(iter(wanted))} with as little as it needs")
        if not any("subnetwork" in each for each in config.get("networkInterfaces", [])):
            faults.append(f"{place}/networkInterfaces: else Ray takes a network that may be open")
    return faults + _watcher_faults(document, "gcp")


def _google_gpu_faults(config: Document, place: str) -> Faults:
    images = " ".join(str(disk.get("initializeParams", {}).get("sourceImage")) for disk in config["disks"])
    driver = re.search(r"nvidia-(\d+)", images)
    faults = [f"{place}/disks: no image with a driver {DRIVER} or newer"] * (not driver or int(driver[1]) < DRIVER)
    scratch = sum(disk.get("type") == "SCRATCH" for disk in config["disks"])
    right = LOCAL_DISKS.get(config["machineType"])
    return faults + [f"{place}/disks: {scratch} local disks, {config['machineType']} takes {right} or none"] * (
        scratch not in (0, right)
    )


def _watcher_faults(document: Document, cloud: str) -> Faults:
    commands = [each for each in document.get("worker_start_ray_commands", []) if "spot_watcher.py" in each]
    right = [each for each in commands if f"--cloud {cloud}" in each and each.rstrip().endswith("&")]
    return ["worker_start_ray_commands: no spot watcher in the background"] * (len(right) != 1)


def local_faults(document: Document) -> Faults:
    """Our own rules for machines that are there."""
    head = " ".join(document.get("head_start_ray_commands", []))
    return ["head_start_ray_commands: without RAY_enable_autoscaler_v2=0 no worker is started"] * (
        "RAY_enable_autoscaler_v2=0" not in head
    )


CHECKS: dict[str, list[Callable[[Document], Faults]]] = {
    "aws.yaml": [schema_faults, aws_faults, common_faults, cloud_faults, aws_rule_faults],
    "gcp.yaml": [schema_faults, gcp_faults, common_faults, cloud_faults, gcp_rule_faults],
    "local.yaml": [schema_faults, common_faults, local_faults],
}


def faults(name: str, document: Document) -> Faults:
    """What is wrong with a file, by the first check that finds something: each relies on those before it."""
    return next(filter(None, (check(document) for check in CHECKS[name])), [])
