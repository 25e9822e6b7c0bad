"""aws.yaml, gcp.yaml and local.yaml: sound, and no typo in them passes."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private import commands
from ray.autoscaler._private.gcp import node

from tests.cluster_rules import CHECKS, CLUSTER, DELETE, faults, load, mutated

SPOT, HEAD, DEMAND = (f"available_node_types/{name}" for name in ("gpu_spot", "head", "gpu_ondemand"))
START = "head_start_ray_commands/1"


def without(text: str) -> Callable[[str], str]:
    def change(old: str) -> str:
        assert text in old
        return old.replace(text, "")

    return change


def renamed(old: str, new: str) -> Callable[[dict], dict]:
    return lambda values: {new if key == old else key: value for key, value in values.items()}


COMMON = [
    ("cluster_nam", "u2pl", "'cluster_nam' was unexpected"),
    ("provider/type", "awz", "awz"),
    ("auth/ssh_usr", "me", "auth: .*'ssh_usr' was unexpected"),
    (START, without("RAY_AUTH_MODE=token"), "head_start_ray_commands: `ray start` without RAY_AUTH_MODE"),
    ("worker_start_ray_commands/1", without("RAY_AUTH_MODE=token"), "worker_start_ray_commands: `ray start` without"),
    (START, without("--dashboard-host=127.0.0.1"), "head_start_ray_commands: dashboard not on loopback"),
    (START, lambda old: old.replace("127.0.0.1", "0.0.0.0"), "head_start_ray_commands: dashboard not on loopback"),
    (START, without("RAY_JOB_STOP_WAIT_TIME_S=120"), "head_start_ray_commands: without RAY_JOB_STOP_WAIT_TIME_S=120"),
    (START, without("--num-cpus=0"), "head_start_ray_commands: work on the head"),
    (START, without("ulimit -n 65536;"), "head_start_ray_commands: files per process"),
    ("file_mounts", renamed("~/.ray/auth_token", "~/.ray/token"), "file_mounts: no token"),
    ("file_mounts", {"~/u2pl-ray/cluster": "clutser"}, "file_mounts/~/u2pl-ray/cluster: clutser is not there"),
    ("setup_commands", [], "setup_commands: token not of mode 600"),
    (
        "setup_commands/2",
        lambda old: old.replace("--require-hashes", ""),
        "setup_commands: packages without hashes",
    ),
]
CLOUD = [
    ("idle_timeout_minutes", -1, "idle_timeout_minutes: -1 is less than the minimum"),
    ("idle_timeout_minutes", 600, "idle_timeout_minutes: idle machines are to go"),
    ("max_workers", 3, "max_workers: fewer than"),
    ("head_node_type", "haed", "head_node_type"),
    (f"{SPOT}/max_worker", 8, "available_node_types/gpu_spot: .*'max_worker' was unexpected"),
    (f"{SPOT}/resources/GPU", "4", "available_node_types/gpu_spot/resources/GPU: '4' is not of type 'integer'"),
    (f"{SPOT}/min_workers", 9, "available_node_types/gpu_spot: min_workers 9, max_workers 8"),
    (f"{SPOT}/min_workers", 99, "smaller than the sum of `min_workers`"),
    (f"{SPOT}/min_workers", DELETE, "available_node_types/gpu_spot: min_workers None"),
    (f"{SPOT}/priority", DELETE, "available_node_types: spot nodes are not the first choice"),
    (f"{DEMAND}/priority", 1, "available_node_types: spot nodes are not the first choice"),
    (f"{HEAD}/resources/CPU", 8, "available_node_types/head/resources: the head is to have none"),
    ("docker/worker_image", "rayproject/ray:latest-gpu", "docker/worker_image: .* not pinned"),
    ("docker/worker_image", "rayproject/ray:2.59.0-py311-gpu", "docker/worker_image: .* not pinned"),
    ("docker/worker_image", "rayproject/ray:2.60.0-py311", "docker/worker_image: no GPU image"),
    ("docker/worker_image", lambda old: f"{old}@sha256:0a", "docker/worker_image: .* not pinned"),
    ("docker/worker_image", DELETE, "Must provide a container & image name"),
    ("docker/container", "u2pl", "docker: .*'container' was unexpected"),
    ("docker/head_run_options/0", "--shm=8g", "docker/head_run_options: no --shm-size="),
    ("docker/worker_run_options/1", "--ulimit=core=0", "docker/worker_run_options: no --ulimit=nofile="),
    ("docker/worker_run_options/2", "--volume=/mnt:/mnt", "docker/worker_run_options: no scratch folder"),
    ("provider/availability_zone", DELETE, "provider/availability_zone: one zone"),
    ("provider/cache_stopped_nodes", DELETE, "provider/cache_stopped_nodes"),
    ("initialization_commands", [], "initialization_commands: no scratch disk"),
    ("worker_start_ray_commands/1", without("--object-spilling-directory=/mnt/scratch/spill"), "no --object-spilling"),
    ("worker_start_ray_commands/2", DELETE, "worker_start_ray_commands: no spot watcher"),
    ("worker_start_ray_commands/2", without("&"), "worker_start_ray_commands: no spot watcher"),
    ("worker_start_ray_commands/2", without("export RAY_AUTH_MODE=token;"), "`spot_watcher.py` without RAY_AUTH_MODE"),
]
AWS = [
    (f"{SPOT}/node_config", renamed("InstanceType", "InstanceTyp"), "gpu_spot/node_config: .*InstanceTyp"),
    (f"{SPOT}/node_config/InstanceMarketOptions", {"MarketTyp": "spot"}, "gpu_spot/node_config: .*MarketTyp"),
    (f"{SPOT}/node_config/InstanceMarketOptions/MarketType", "sport", "gpu_spot/node_config/InstanceMarketOptions"),
    (f"{SPOT}/node_config/InstanceMarketOptions", DELETE, "gpu_spot/node_config/InstanceMarketOptions"),
    (f"{DEMAND}/node_config/InstanceMarketOptions", {"MarketType": "spot"}, "gpu_ondemand/node_config/InstanceMark"),
    (f"{HEAD}/node_config/BlockDeviceMappings/0/Ebs/VolumeSize", "200", "head/node_config: .*VolumeSize"),
    (f"{HEAD}/node_config/BlockDeviceMappings/0/Ebs/Encrypted", False, "head/node_config/BlockDeviceMappings"),
    (f"{SPOT}/node_config/BlockDeviceMappings/0/Ebs/VolumeType", "gp2", "gpu_spot/node_config/BlockDeviceMappings"),
    (f"{SPOT}/node_config/MetadataOptions/HttpTokens", "optional", "gpu_spot/node_config/MetadataOptions"),
    (f"{HEAD}/node_config/MetadataOptions", DELETE, "head/node_config/MetadataOptions: missing"),
    (f"{HEAD}/node_config/IamInstanceProfile", DELETE, "head/node_config/IamInstanceProfile: missing"),
    (f"{SPOT}/node_config/IamInstanceProfile", {"Nam": "x"}, "gpu_spot/node_config: .*IamInstanceProfile.*Nam"),
    (f"{SPOT}/node_config/SecurityGroupIds", DELETE, "gpu_spot/node_config/SecurityGroupIds: missing"),
    (f"{HEAD}/node_config/ImageId", DELETE, "head/node_config/ImageId: missing"),
    (f"{SPOT}/node_config/ImageId", "resolve:ssm:/latest/ami-id", "gpu_spot/node_config/ImageId: not as it must be"),
    ("provider/security_group", {"GroupName": "u2pl"}, "provider/security_group: Ray adds ssh from 0.0.0.0/0"),
    ("provider/availability_zone", "us-west-2a,us-west-2b", "provider/availability_zone: one zone"),
    ("worker_start_ray_commands/2", lambda old: old.replace("aws", "gcp"), "no spot watcher"),
]
GCP = [
    (
        f"{SPOT}/node_config",
        renamed("machineType", "machinetype"),
        "machineType|gpu_spot/node_config/machinetype: unknown",
    ),
    (f"{SPOT}/node_config/disks/0/initializeParams/diskSizeGb", [200], "initializeParams/diskSizeGb: .*is no string"),
    (f"{SPOT}/node_config/disks/1/interfaces", "NVME", "gpu_spot/node_config/disks/1/interfaces: unknown"),
    (f"{SPOT}/node_config/scheduling/provisioningModel", "SPOTS", "gpu_spot/node_config/scheduling/provisioningModel"),
    (f"{SPOT}/node_config/scheduling", [{"preemptible": True}], "gpu_spot/node_config/scheduling: .*is no object"),
    (f"{DEMAND}/node_config/scheduling/onHostMaintenance", "MIGRATE", "gpu_ondemand/node_config/scheduling"),
    (f"{DEMAND}/node_config/serviceAccounts", DELETE, "gpu_ondemand/node_config/serviceAccounts: not u2pl-w"),
    (f"{HEAD}/node_config/serviceAccounts", DELETE, "head/node_config/serviceAccounts: not u2pl-head"),
    (
        f"{SPOT}/node_config/serviceAccounts/0/scopes",
        ["https://www.googleapis.com/auth/cloud-platform"],
        "gpu_spot/node_config/serviceAccounts: not u2pl-worker with as little",
    ),
    (f"{HEAD}/node_config/networkInterfaces", DELETE, "head/node_config/networkInterfaces"),
    (
        f"{SPOT}/node_config/disks/4",
        DELETE,
        "gpu_spot/node_config/disks: 3 local disks, g2-standard-48 takes 4 or none",
    ),
    (
        f"{SPOT}/node_config/disks/0/initializeParams/sourceImage",
        lambda old: old.replace("580", "550"),
        "gpu_spot/node_config/disks: no image with a driver 580",
    ),
    (
        f"{HEAD}/node_config/disks/0/initializeParams/sourceImage",
        "projects/deeplearning-platform-release/global/images/family/common-cpu",
        "head/node_config/disks: a family",
    ),
    (f"{SPOT}/node_config/disks/0/boot", "yes", "gpu_spot/node_config/disks/0/boot: 'yes' is no boolean"),
]
LOCAL = [
    (START, without("RAY_enable_autoscaler_v2=0"), "head_start_ray_commands: without RAY_enable_autoscaler_v2=0"),
    ("provider/worker_ips", DELETE, "head_ip"),
    ("available_node_types", {"gpu": {}}, "not supported for on-premise"),
]
MUTATIONS = [
    *[("aws.yaml", *each) for each in [*COMMON, *CLOUD, *AWS]],
    *[("gcp.yaml", *each) for each in [*COMMON, *CLOUD, *GCP]],
    *[("local.yaml", *each) for each in [*COMMON, *LOCAL]],
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_file_is_sound(name: str) -> None:
    assert faults(name, load(name)) == []


def test_an_image_may_be_named_by_its_digest() -> None:
    by_digest = mutated(load("aws.yaml"), "docker/worker_image", lambda old: f"{old}@sha256:{'0a' * 32}")
    assert faults("aws.yaml", by_digest) == []


@pytest.mark.parametrize(("name", "path", "value", "told"), MUTATIONS)
def test_a_typo_is_caught_and_its_place_told(
    name: str, path: str, value: Any, told: str, capsys: pytest.CaptureFixture
) -> None:
    found = "\n".join(faults(name, mutated(load(name), path, value))) + "\n" + capsys.readouterr().out
    assert re.search(told, found), found


@pytest.mark.parametrize("name", CHECKS)
def test_shell_lines_are_sound(name: str, tmp_path: Path) -> None:
    document = load(name)
    keys = [key for key in document if key.endswith("_commands")]
    assert keys
    for key in keys:
        for number, command in enumerate(document[key]):
            script = tmp_path / f"{key}-{number}.sh"
            script.write_text(f"export RAY_HEAD_IP=10.0.0.1\n{command}\n")
            checker = [str(Path(sys.executable).parent / "shellcheck"), "--shell=bash", "--exclude=SC2088", str(script)]
            done = subprocess.run(checker, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


HEAD_ACTIONS = {
    "ec2:DescribeInstances",
    "ec2:RunInstances",
    "ec2:CreateTags",
    "ec2:TerminateInstances",
    "iam:PassRole",
}
S3_ACTIONS = {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}


def test_the_s3_policy_gives_no_more_than_one_bucket() -> None:
    policy = json.loads((CLUSTER / "s3-policy.json").read_text())
    actions = {action for each in policy["Statement"] for action in each["Action"]}
    assert actions == S3_ACTIONS
    for each in policy["Statement"]:
        assert each["Effect"] == "Allow"
        objects = each["Action"] != ["s3:ListBucket"]
        assert each["Resource"] == ["arn:aws:s3:::BUCKET" + "/*" * objects]


def test_the_heads_policy_starts_and_ends_nodes_and_no_more() -> None:
    policy = json.loads((CLUSTER / "head-policy.json").read_text())
    by_action = {action: each for each in policy["Statement"] for action in each["Action"]}
    assert set(by_action) == HEAD_ACTIONS
    assert by_action["iam:PassRole"]["Resource"] == ["arn:aws:iam::ACCOUNT:role/u2pl-worker"]
    own = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": load("aws.yaml")["cluster_name"]}}
    assert by_action["ec2:TerminateInstances"]["Condition"] == own
    # whoever may name any instance may end it: only new ones, and those of the cluster
    naming = [each["Condition"] for each in policy["Statement"] if "ec2:CreateTags" in each["Action"]]
    assert naming == [{"StringEquals": {"ec2:CreateAction": "RunInstances"}}, own]


def test_the_role_of_googles_head_starts_and_ends_machines_and_no_more() -> None:
    allowed = load("gcp-head-role.yaml")["includedPermissions"]
    kinds = {tuple(each.split(".")[:2]) for each in allowed}
    assert kinds == {("compute", each) for each in ("instances", "disks", "subnetworks", "zoneOperations")}
    calls = set(re.findall(r"instances\(\)\s*\.(\w+)\(", Path(node.__file__).read_text()))
    calls -= {"stop", "start"}  # machines are ended: cache_stopped_nodes is false
    of_ray = {"insert": "create"}
    assert {f"compute.instances.{of_ray.get(each, each)}" for each in calls} <= set(allowed)
    assert not [each for each in allowed if re.search("setIamPolicy|getSerialPort|osLogin|update", each)]


def test_the_head_of_google_keeps_the_account_of_the_file() -> None:
    """Ray lays its own below what the file says."""
    source = inspect.getsource(commands.get_or_create_head_node)
    assert 'head_node_config.update(head_config["node_config"])' in source
