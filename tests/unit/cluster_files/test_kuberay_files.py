"""The KubeRay files: sound, alike, and no typo in them passes."""

import re
from typing import Any

import pytest

from tests.cluster_rules import DELETE, load, mutated
from tests.kuberay_rules import JOB_SERVER, NODE, POLICY, admits, faults, policy_faults

FILES = {"kuberay/raycluster.yaml": "spec", "kuberay/rayjob.yaml": "spec/rayClusterSpec"}
HEAD, SPOT = "headGroupSpec/template/spec", "workerGroupSpecs/0/template/spec"
IN_THE_CLUSTER = [
    ("rayVersio", "2.60.0", "'rayVersio' was unexpected"),
    ("rayVersion", "2.59.0", "/?rayVersion: not as it must be"),
    ("rayVersion", 2.6, "rayVersion: 2.6 is not of type 'string'"),
    ("enableInTreeAutoscaling", DELETE, "enableInTreeAutoscaling"),
    ("autoscalerOptions/version", "v3", "autoscalerOptions/version: 'v3' is not one of"),
    ("autoscalerOptions/version", "v1", "autoscalerOptions/version: not as it must be"),
    ("autoscalerOptions/idleTimeout", 3, "autoscalerOptions: .*'idleTimeout' was unexpected"),
    ("authOptions", DELETE, "authOptions/mode: not as it must be"),
    ("authOptions/mode", "tokens", "authOptions/mode: 'tokens' is not one of"),
    ("authOptions/mode", "disabled", "authOptions/mode: not as it must be"),
    ("gcsFaultToleranceOptions/redisAdress", "x", "gcsFaultToleranceOptions: .*'redisAdress' was unexpected"),
    ("gcsFaultToleranceOptions/redisPassword", {"value": "open"}, "redisPassword/valueFrom: not as it must be"),
    ("headGroupSpec/rayStartParams/num-cpus", 0, "rayStartParams/num-cpus: 0 is not of type 'string'"),
    ("headGroupSpec/rayStartParams/num-cpus", "8", "rayStartParams/num-cpus: not as it must be"),
    ("workerGroupSpecs/0/minReplica", 0, "workerGroupSpecs/0: .*'minReplica' was unexpected"),
    ("workerGroupSpecs/0/maxReplicas", DELETE, "workerGroupSpecs/0: 'maxReplicas' is a required property"),
    ("workerGroupSpecs/0/minReplicas", 9, "workerGroupSpecs/0: minReplicas 9"),
    (f"{SPOT}/toleration", [], "workerGroupSpecs/0/template/spec: .*'toleration' was unexpected"),
    (f"{SPOT}/tolerations", DELETE, "workerGroupSpecs/0/template/spec/tolerations: none"),
    (f"{SPOT}/tolerations/0/effects", "NoSchedule", "spec/tolerations/0: .*'effects' was unexpected"),
    (
        f"{SPOT}/containers/0/resources/limits",
        {"cpu": "44"},
        "containers/0/resources: nvidia.com/gpu asked 4, limit None",
    ),
    (
        f"{SPOT}/containers/0/lifecycle/preStop",
        {"exec": {"command": ["true"]}},
        "lifecycle: spot_watcher.py --drain",
    ),
    (f"{HEAD}/containers/0/lifecycle", DELETE, "headGroupSpec/.*/lifecycle: spot_watcher.py --end-jobs does not run"),
    (f"{HEAD}/terminationGracePeriodSeconds", DELETE, "headGroupSpec/.*/terminationGracePeriodSeconds: less than"),
    (f"{SPOT}/terminationGracePeriodSeconds", 30, "terminationGracePeriodSeconds: less than"),
    (f"{SPOT}/serviceAccountName", DELETE, "workerGroupSpecs/0/template/spec/serviceAccountName"),
    (f"{SPOT}/volumes/0/emptyDir/sizeLimit", DELETE, "workerGroupSpecs/0/template/spec/volumes"),
    (f"{SPOT}/containers/0/volumeMounts/0/mountPath", "/dev/sh", "workerGroupSpecs/0/template/spec/volumes"),
    (f"{HEAD}/containers/0/image", "rayproject/ray:latest", "headGroupSpec/template/spec/containers/0/image"),
    (f"{HEAD}/containers/0/imag", "x", "headGroupSpec/template/spec/containers/0: .*'imag' was unexpected"),
    (
        f"{HEAD}/containers/0/ports/0/containerPort",
        "6379",
        "headGroupSpec/template/spec/containers/0/ports/0/containerPort",
    ),
    (f"{HEAD}/containers/0/env/0", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "containers/0/env"),
    (f"{HEAD}/containers/0/securityContext/runAsNonRoot", False, "headGroupSpec/.*/containers/0/securityContext"),
    ("headGroupSpec/template/metadata", DELETE, "headGroupSpec/template/metadata/labels: networkpolicy.yaml"),
    ("workerGroupSpecs/1/template/metadata/labels", {"app": "u2pl"}, "workerGroupSpecs/1/template/metadata/labels"),
    (f"{HEAD}/restartPolicy", "Always", "headGroupSpec/template/spec/restartPolicy"),
]
IN_THE_JOB = [
    ("apiVersion", "ray.io/v2", "apiVersion"),
    ("kind", "RayJobs", "kind: 'RayJobs' is none of"),
    ("spec/submissionMode", "K8JobMode", "spec/submissionMode: 'K8JobMode' is not one of"),
    ("spec/entrypoints", "x", "spec: .*'entrypoints' was unexpected"),
    ("spec/shutdownAfterJobFinishes", False, "spec/shutdownAfterJobFinishes: the cluster would stay"),
    ("spec/entrypoint", "python jobs/train.py --out /tmp/run", "spec/entrypoint: results must outlive"),
    ("spec/submitterPodTemplate", DELETE, "spec/submitterPodTemplate: networkpolicy.yaml does not let it"),
    ("spec/submitterPodTemplate/metadata/labels", {}, "spec/submitterPodTemplate: networkpolicy.yaml does not let it"),
    ("spec/submitterPodTemplate/spec/containers/0/imag", "x", "spec/submitterPodTemplate/spec/containers/0: "),
    ("spec/backoffLimit", "3", "spec/backoffLimit: '3' is not of type 'integer'"),
]
IN_THE_POLICY = [
    ("apiVersion", "v1", "apiVersion: v1 has no NetworkPolicy"),
    ("spec/ingres", [], "'ingres' was unexpected"),
    ("spec/podSelector", {}, "spec/podSelector: all pods"),
    ("spec/policyTypes", ["Egress"], "spec/policyTypes: not Ingress"),
    ("spec/ingress/0", {}, "spec/ingress/0/from: pods without a label"),
    ("spec/ingress/1/from/0/podSelector", {}, "spec/ingress/1/from: pods without a label"),
    ("spec/ingress/1/from/1/namespaceSelector", {}, "spec/ingress/1/from: any namespace"),
    ("spec/ingress/1/ports", DELETE, "spec/ingress/1/ports: more than"),
    ("spec/ingress/1/ports/0/port", 6379, "spec/ingress/1/ports: more than"),
]
MUTATIONS = [
    *[(name, f"{place}/{path}", value, told) for name, place in FILES.items() for path, value, told in IN_THE_CLUSTER],
    *[("kuberay/rayjob.yaml", *each) for each in IN_THE_JOB],
]


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_sound(name: str) -> None:
    assert faults(load(name)) == []


@pytest.mark.parametrize(("name", "path", "value", "told"), MUTATIONS)
def test_a_typo_is_caught_and_its_place_told(name: str, path: str, value: Any, told: str) -> None:
    found = "\n".join(faults(mutated(load(name), path, value)))
    assert re.search(told, found), found


def test_both_files_describe_the_same_cluster() -> None:
    assert load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"] == load("kuberay/raycluster.yaml")["spec"]


def test_the_policy_is_sound() -> None:
    assert policy_faults(POLICY) == []


@pytest.mark.parametrize(("path", "value", "told"), IN_THE_POLICY)
def test_a_slip_in_the_policy_is_caught(path: str, value: Any, told: str) -> None:
    found = "\n".join(policy_faults(mutated(POLICY, path, value)))
    assert re.search(told, found), found


def test_who_reaches_what() -> None:
    """Ray's own port, its clients' and the job server's, of the head; and any port of a worker."""
    ports, operator = (6379, 10001, JOB_SERVER, 31234), {"app.kubernetes.io/component": "kuberay-operator"}
    home = {"kubernetes.io/metadata.name": "OPERATOR_NAMESPACE"}

    def reached(labels: dict[str, str], namespace: dict[str, str] | None = None) -> list[int]:
        return [port for port in ports if admits(POLICY, labels, port, namespace)]

    assert reached({**NODE, "ray.io/node-type": "worker"}) == [*ports]
    assert reached({"u2pl-may-submit": "true"}) == [JOB_SERVER]
    assert reached(operator, home) == [JOB_SERVER]
    assert reached(operator, {"kubernetes.io/metadata.name": "another"}) == []
    assert reached({**NODE, "u2pl-may-submit": "true"}, home) == []  # labels count in their own namespace alone
    assert reached({"app": "another"}) == reached({}) == reached({}, home) == []
