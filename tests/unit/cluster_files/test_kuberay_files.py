"""The KubeRay files: sound, alike, and no typo in them passes."""

import re
from typing import Any

import pytest

from tests.cluster_rules import DELETE, load, mutated
from tests.kuberay_rules import faults

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
    (f"{SPOT}/containers/0/lifecycle/preStop", {"exec": {"command": ["true"]}}, "containers/0/lifecycle: the node"),
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
    (f"{HEAD}/restartPolicy", "Always", "headGroupSpec/template/spec/restartPolicy"),
]
IN_THE_JOB = [
    ("apiVersion", "ray.io/v2", "apiVersion"),
    ("kind", "RayJobs", "kind: 'RayJobs' is none of"),
    ("spec/submissionMode", "K8JobMode", "spec/submissionMode: 'K8JobMode' is not one of"),
    ("spec/entrypoints", "x", "spec: .*'entrypoints' was unexpected"),
    ("spec/shutdownAfterJobFinishes", False, "spec/shutdownAfterJobFinishes: the cluster would stay"),
    ("spec/entrypoint", "python jobs/train.py --out /tmp/run", "spec/entrypoint: results must outlive"),
    ("spec/backoffLimit", "3", "spec/backoffLimit: '3' is not of type 'integer'"),
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
