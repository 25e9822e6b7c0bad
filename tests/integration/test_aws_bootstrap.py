"""cluster/aws_setup.py, then what `ray up` does before it starts machines, against a mock of EC2 and IAM.

The mock checks neither rights nor most parameters: what it proves is what is asked for, not that AWS would grant it.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster import aws_setup
from tests.cluster_rules import Document, load, mutated

REGION = load("aws.yaml")["provider"]["region"]
ME = "203.0.113.7/32"


@pytest.fixture(autouse=True)
def _account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty account, and a home directory for the ssh key that Ray makes."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()
    with mock_aws():
        yield
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()


def client(service: str) -> Any:
    return boto3.client(service, region_name=REGION)


def set_up(capsys: pytest.CaptureFixture) -> Document:
    """aws.yaml as the page says to fill it in, with an image that the mock has."""
    aws_setup.main(["--bucket", "my-bucket", "--ssh-from", ME])
    group = capsys.readouterr().out.rpartition("[")[2].strip("]\n")
    image = client("ec2").describe_images()["Images"][0]["ImageId"]
    document = load("aws.yaml")
    for name in document["available_node_types"]:
        place = f"available_node_types/{name}/node_config"
        document = mutated(document, f"{place}/SecurityGroupIds", [group])
        document = mutated(document, f"{place}/ImageId", image)
    return document


def bootstrapped(document: Document) -> Document:
    config = prepare_config(document)
    validate_config(config)
    return bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))


def ingress() -> list[tuple[str, dict]]:
    """Rules of all groups but the networks' own, by group."""
    groups = client("ec2").describe_security_groups()["SecurityGroups"]
    return [(group["GroupId"], rule) for group in groups if group["GroupName"] != "default"
            for rule in group["IpPermissions"]]  # fmt: skip


def test_the_file_comes_up_as_it_says(capsys: pytest.CaptureFixture) -> None:
    config = bootstrapped(set_up(capsys))
    kinds = config["available_node_types"]
    assert kinds["gpu_spot"]["resources"]["GPU"] == 4
    assert kinds["head"]["resources"]["CPU"] == 0
    zone = config["provider"]["availability_zone"]
    for kind in kinds.values():
        subnets = client("ec2").describe_subnets(SubnetIds=kind["node_config"]["SubnetIds"])["Subnets"]
        assert {each["AvailabilityZone"] for each in subnets} == {zone}
    nothing_is_open()
    nobody_has_full_access()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, market in {"gpu_spot": "spot", "gpu_ondemand": None, "cpu": None, "head": None}.items():
        (instance,) = provider.create_node(kinds[name]["node_config"], {}, 1).values()
        described = client("ec2").describe_instances(InstanceIds=[instance.id])["Reservations"][0]["Instances"][0]
        assert described.get("InstanceLifecycle") == market
        assert described["InstanceType"] == kinds[name]["node_config"]["InstanceType"]
        assert described["IamInstanceProfile"]["Arn"].endswith("u2pl-head" if name == "head" else "u2pl-worker")
        assert described["MetadataOptions"]["HttpTokens"] == "required"
        tags = {tag["Key"]: tag["Value"] for tag in described["Tags"]}
        assert tags["ray-cluster-name"] == "u2pl"  # the head may end what has this tag
        provider.terminate_node(instance.id)


def nothing_is_open() -> None:
    rules = ingress()
    assert len(rules) == 2
    for group, rule in rules:
        sources = [each["CidrIp"] for each in rule["IpRanges"]] + [each["CidrIpv6"] for each in rule["Ipv6Ranges"]]
        if rule["IpProtocol"] == "-1":
            assert sources == []
            assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group]
        else:
            assert (rule["FromPort"], rule["ToPort"], sources) == (22, 22, [ME])


def nobody_has_full_access() -> None:
    iam = client("iam")
    roles = [role["RoleName"] for role in iam.list_roles()["Roles"] if not role["Path"].startswith("/aws-service-role")]
    assert sorted(roles) == ["u2pl-head", "u2pl-worker"]
    for role in roles:
        assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
            document = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
            text = json.dumps(document)
            assert "BUCKET" not in text
            assert "ACCOUNT" not in text
            assert not [action for each in document["Statement"] for action in each["Action"] if "*" in action]
    assert set(iam.list_role_policies(RoleName="u2pl-worker")["PolicyNames"]) == {"u2pl-s3"}


def test_setting_up_again_changes_only_the_addresses(capsys: pytest.CaptureFixture) -> None:
    set_up(capsys)
    before = {group for group, _ in ingress()}
    aws_setup.main(["--bucket", "my-bucket", "--ssh-from", "198.51.100.0/24"])
    assert {group for group, _ in ingress()} == before
    ranges = [each["CidrIp"] for _, rule in ingress() for each in rule["IpRanges"]]
    assert ranges == ["198.51.100.0/24"]


def test_the_file_as_it_is_ends_without_opening_anything(capsys: pytest.CaptureFixture) -> None:
    """Who forgets to fill in the group is told so; Ray does not make one of its own instead."""
    aws_setup.main(["--bucket", "my-bucket", "--ssh-from", ME])
    with pytest.raises(AssertionError):
        bootstrapped(load("aws.yaml"))
    assert "Failed to detect a security group" in capsys.readouterr().err
    nothing_is_open()


@pytest.mark.parametrize("ranges", ["0.0.0.0/0", "128.0.0.0/1", "not-an-address", "10.0.0.1/8"])
def test_the_world_is_refused(ranges: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        aws_setup.main(["--bucket", "my-bucket", "--ssh-from", ranges])
    assert caught.value.code == 2
    assert "--ssh-from" in capsys.readouterr().err
    assert ingress() == []


def test_an_instance_type_that_the_region_lacks_is_refused(capsys: pytest.CaptureFixture) -> None:
    document = mutated(set_up(capsys), "available_node_types/gpu_spot/node_config/InstanceType", "g5.13xlarge")
    with pytest.raises(ValueError, match=r"g5\.13xlarge"):
        bootstrapped(document)


def test_without_its_own_group_ray_would_let_the_world_try_ssh(capsys: pytest.CaptureFixture) -> None:
    """Why the rules ask for SecurityGroupIds: Ray adds this rule to any group that it makes."""
    document = set_up(capsys)
    for kind in document["available_node_types"].values():
        del kind["node_config"]["SecurityGroupIds"]
    document["provider"]["security_group"] = {"GroupName": "another"}
    with contextlib.suppress(Exception):
        bootstrapped(document)
    assert "0.0.0.0/0" in [each["CidrIp"] for _, rule in ingress() for each in rule["IpRanges"]]
