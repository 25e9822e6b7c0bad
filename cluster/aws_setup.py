"""Makes, once per account, what cluster/aws.yaml names: roles with few rights, and a security group that is not open.

    python cluster/aws_setup.py --bucket my-bucket --ssh-from 203.0.113.7/32

Makes the instance profiles u2pl-head and u2pl-worker with the rights of s3-policy.json and head-policy.json, and a
security group where nodes reach each other and ssh is open to the given addresses. What is there already is kept and
brought up to date. Prints the group's id for aws.yaml.
"""

import argparse
import ipaddress
import json
import sys
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

HERE = Path(__file__).parent
HEAD, WORKER = "u2pl-head", "u2pl-worker"
_EC2_MAY_TAKE_IT = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def policies(bucket: str, account: str) -> dict[str, dict[str, str]]:
    """Policy documents by role and by name.

    Args:
        bucket: the bucket of data and runs.
        account: the account's number of 12 digits.
    """
    s3 = (HERE / "s3-policy.json").read_text().replace("BUCKET", bucket)
    head = (HERE / "head-policy.json").read_text().replace("ACCOUNT", account)
    return {HEAD: {"u2pl-s3": s3, "u2pl-start-nodes": head}, WORKER: {"u2pl-s3": s3}}


def make_profiles(iam: Any, bucket: str, account: str) -> None:
    """Makes the roles with their policies, and an instance profile of the same name for each."""
    for role, documents in policies(bucket, account).items():
        _once(iam.create_role, RoleName=role, AssumeRolePolicyDocument=json.dumps(_EC2_MAY_TAKE_IT))
        for name, document in documents.items():
            iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=document)
        _once(iam.create_instance_profile, InstanceProfileName=role)
        _once(iam.add_role_to_instance_profile, InstanceProfileName=role, RoleName=role)
    _once(iam.create_service_linked_role, AWSServiceName="spot.amazonaws.com")  # a first spot request needs it


def make_group(ec2: Any, name: str, sources: list[str], vpc: str | None) -> str:
    """Makes the security group.

    Args:
        ec2: client.
        name: of the group.
        sources: address ranges that may open ssh.
        vpc: id of the network; None takes the region's default one.

    Returns:
        The group's id.
    """
    which = [{"Name": "vpc-id", "Values": [vpc]}] if vpc else [{"Name": "is-default", "Values": ["true"]}]
    found = ec2.describe_vpcs(Filters=which)["Vpcs"]
    if not found:
        raise ValueError(f"no network {vpc}" if vpc else "this region has no default network: name one with --vpc")
    network = found[0]["VpcId"]
    same = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [network]}]
    groups = ec2.describe_security_groups(Filters=same)["SecurityGroups"]
    group = groups[0]["GroupId"] if groups else ec2.create_security_group(
        GroupName=name, Description="u2pl: nodes among themselves, ssh from named addresses", VpcId=network
    )["GroupId"]  # fmt: skip
    if groups and groups[0]["IpPermissions"]:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=groups[0]["IpPermissions"])
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": each} for each in sources]}
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[among, ssh])
    return group


def address_range(text: str) -> str:
    """An IPv4 range for ssh; the whole world and half of it are refused."""
    network = ipaddress.IPv4Network(text)
    if network.prefixlen < 8:
        raise argparse.ArgumentTypeError(
            f"{text} is too much of the world: give your own addresses, such as A.B.C.D/32"
        )
    return str(network)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = yaml.safe_load((HERE / "aws.yaml").read_text())
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bucket", required=True, help="bucket of data and runs")
    parser.add_argument("--ssh-from", required=True, type=address_range, nargs="+", metavar="RANGE")
    parser.add_argument("--vpc", help="network (default: the region's default one)")
    parser.add_argument("--region", default=config["provider"]["region"], help="(default: the one in aws.yaml)")
    args = parser.parse_args(argv)
    try:
        session = boto3.Session(region_name=args.region)
        account = session.client("sts").get_caller_identity()["Account"]
        make_profiles(session.client("iam"), args.bucket, account)
        group = make_group(session.client("ec2"), config["cluster_name"], args.ssh_from, args.vpc)
    except (BotoCoreError, ClientError, ValueError) as error:
        sys.exit(f"aws_setup.py: {error}")
    print(f"put this group into cluster/aws.yaml:\n  SecurityGroupIds: &group [{group}]")


def _once(method: Any, **options: Any) -> None:
    """Makes something; it may be there already."""
    try:
        method(**options)
    except ClientError as error:
        if error.response["Error"]["Code"] not in {"EntityAlreadyExists", "LimitExceeded", "InvalidInput"}:
            raise


if __name__ == "__main__":
    main()
