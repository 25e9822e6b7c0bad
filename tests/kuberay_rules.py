"""What must hold for the files in cluster/kuberay; each check takes the parsed file and returns faults with places."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import ray

from tests.cluster_rules import IMAGE, Document, Faults, load

Labels = Mapping[str, str]

_VERSION = ".".join(kubernetes_validate.latest_version().split(".")[:2])


def _object(required: str = "", **properties: Any) -> Document:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


_TEXT, _COUNT, _FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_WORDS = {"type": "object", "additionalProperties": _TEXT}
_TEMPLATE = _object("spec", metadata={"type": "object"}, spec={"type": "object"})
_GROUP = _object(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=_TEXT, replicas=_COUNT, minReplicas=_COUNT, maxReplicas=_COUNT, numOfHosts=_COUNT, suspend=_FLAG,
    idleTimeoutSeconds=_COUNT, priority={"type": "integer"}, labels=_WORDS, resources=_WORDS, rayStartParams=_WORDS,
    template=_TEMPLATE,
)  # fmt: skip
CLUSTER_SPEC = _object(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=_TEXT,
    enableInTreeAutoscaling=_FLAG,
    suspend=_FLAG,
    autoscalerOptions=_object(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=_COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources={"type": "object"},
    ),
    authOptions=_object("mode", mode={"enum": ["disabled", "token"]}),
    gcsFaultToleranceOptions=_object(
        "redisAddress",
        redisAddress=_TEXT,
        redisPassword=_object(
            value=_TEXT, valueFrom=_object(secretKeyRef=_object("name key", name=_TEXT, key=_TEXT, optional=_FLAG))
        ),
        externalStorageNamespace=_TEXT,
    ),
    headGroupSpec=_object("rayStartParams template", rayStartParams=_WORDS, template=_TEMPLATE, labels=_WORDS),
    workerGroupSpecs={"type": "array", "minItems": 1, "items": _GROUP},
)
"""The keys of ray.io/v1 in use, and their neighbours; strict, where Kubernetes would drop an unknown key."""
_JOB_SPEC = _object(
    "entrypoint rayClusterSpec",
    entrypoint=_TEXT,
    rayClusterSpec=CLUSTER_SPEC,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    shutdownAfterJobFinishes=_FLAG,
    runtimeEnvYAML=_TEXT,
    metadata=_WORDS,
    suspend=_FLAG,
    submitterPodTemplate=_TEMPLATE,
    **dict.fromkeys(
        ["ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "preRunningDeadlineSeconds"], _COUNT
    ),
)
_METADATA = _object(name=_TEXT, generateName=_TEXT, namespace=_TEXT, labels=_WORDS, annotations=_WORDS)
POLICY = load("kuberay/networkpolicy.yaml")
NODE: Labels = POLICY["spec"]["podSelector"]["matchLabels"]
"""What the pods of our clusters have as labels."""
JOB_SERVER = 8265
_SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": _JOB_SPEC}


def schema_faults(document: Document) -> Faults:
    """Unknown keys and wrong types of the ray.io/v1 part."""
    kind = document.get("kind")
    if kind not in _SPECS:
        return [f"kind: {kind!r} is none of {', '.join(_SPECS)}"]
    schema = _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"}, kind=_TEXT, metadata=_METADATA, spec=_SPECS[kind],
    )  # fmt: skip
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def cluster_spec(document: Document) -> tuple[str, Document]:
    """The place and the spec of the cluster in either kind of file."""
    if document["kind"] == "RayJob":
        return "spec/rayClusterSpec", document["spec"]["rayClusterSpec"]
    return "spec", document["spec"]


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """The place and the template of every pod of the cluster, the head's first."""
    place, spec = cluster_spec(document)
    yield f"{place}/headGroupSpec/template", spec["headGroupSpec"]["template"]
    for number, group in enumerate(spec["workerGroupSpecs"]):
        yield f"{place}/workerGroupSpecs/{number}/template", group["template"]


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """The place and the spec of every pod of the cluster, the head's first."""
    for place, template in templates(document):
        yield f"{place}/spec", template["spec"]


def pod_faults(document: Document) -> Faults:
    """What the API of Kubernetes itself does not know in the pods."""
    every = [*templates(document)]
    if "submitterPodTemplate" in document["spec"]:
        every.append(("spec/submitterPodTemplate", document["spec"]["submitterPodTemplate"]))
    return [
        f"{place}/{error}"
        for place, template in every
        if (error := _api_error(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template})))
    ]


@cache
def _api_error(document: str) -> str:
    try:
        kubernetes_validate.validate(json.loads(document), _VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'/'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"apiVersion: {error.api_version} has no {error.kind}"
    return ""


def policy_faults(policy: Document) -> Faults:
    """What is wrong with the NetworkPolicy."""
    error = _api_error(json.dumps(policy))
    if error:
        return [error]
    own, spec = policy["spec"]["podSelector"].get("matchLabels"), policy["spec"]
    faults = ["spec/podSelector: all pods of the namespace"] * (not own)
    faults += ["spec/policyTypes: not Ingress alone"] * (spec.get("policyTypes") != ["Ingress"])
    for number, rule in enumerate(spec.get("ingress", [])):
        at = f"spec/ingress/{number}"
        for peer in rule.get("from", [{}]):
            inside = peer == {"podSelector": {"matchLabels": own}}
            faults += [f"{at}/from: pods without a label"] * (not peer.get("podSelector", {}).get("matchLabels"))
            faults += [f"{at}/from: any namespace"] * (peer.get("namespaceSelector") == {})
            faults += [f"{at}/ports: more than the job server"] * (
                not inside and [each.get("port") for each in rule.get("ports", [])] != [JOB_SERVER]
            )
    return faults


def admits(policy: Document, labels: Labels, port: int, namespace: Labels | None = None) -> bool:
    """Whether a pod reaches a port of the cluster's pods.

    Args:
        policy: the NetworkPolicy.
        labels: of the pod.
        port: of TCP.
        namespace: labels of the pod's namespace; None: it is the policy's own.
    """
    for rule in policy["spec"]["ingress"]:
        for peer in rule["from"]:
            there = peer.get("namespaceSelector", {}).get("matchLabels")
            placed = namespace is None if there is None else there.items() <= (namespace or {}).items()
            ports = [each["port"] for each in rule.get("ports", [])] or [port]
            if placed and peer["podSelector"]["matchLabels"].items() <= labels.items() and port in ports:
                return True
    return False


def rule_faults(document: Document) -> Faults:
    """Our own rules."""
    place, spec = cluster_spec(document)
    faults = []
    wanted = {
        "rayVersion": spec["rayVersion"] == ray.__version__,
        "enableInTreeAutoscaling": spec.get("enableInTreeAutoscaling") is True,
        "autoscalerOptions/version": spec.get("autoscalerOptions", {}).get("version") == "v2",
        "authOptions/mode": spec.get("authOptions", {}).get("mode") == "token",
        "gcsFaultToleranceOptions/redisPassword/valueFrom": "valueFrom"
        in spec.get("gcsFaultToleranceOptions", {}).get("redisPassword", {}),
        "headGroupSpec/rayStartParams/num-cpus": spec["headGroupSpec"]["rayStartParams"].get("num-cpus") == "0",
    }
    faults += [f"{place}/{key}: not as it must be" for key, right in wanted.items() if not right]
    for number, group in enumerate(spec["workerGroupSpecs"]):
        at = f"{place}/workerGroupSpecs/{number}"
        least, most = group["minReplicas"], group["maxReplicas"]
        if not least <= group.get("replicas", least) <= most or most == 0:
            faults.append(f"{at}: minReplicas {least}, replicas {group.get('replicas')}, maxReplicas {most}")
        faults += _gpu_faults(f"{at}/template/spec", group["template"]["spec"])
    faults += [
        f"{at}/metadata/labels: networkpolicy.yaml does not know this pod"
        for at, template in templates(document)
        if not NODE.items() <= template.get("metadata", {}).get("labels", {}).items()
    ]
    faults += _hook_faults(*next(pods(document)), "--end-jobs")
    for at, pod in pods(document):
        faults += _pod_rule_faults(at, pod)
    if document["kind"] == "RayJob":
        faults += _job_faults(document["spec"])
    return faults


def _gpu_faults(at: str, pod: Document) -> Faults:
    faults = []
    resources = pod["containers"][0].get("resources", {})
    asked, limit = (resources.get(each, {}).get("nvidia.com/gpu") for each in ("requests", "limits"))
    if asked is None or asked != limit:
        faults.append(f"{at}/containers/0/resources: nvidia.com/gpu asked {asked}, limit {limit}")
    if not any(each.get("key") == "nvidia.com/gpu" for each in pod.get("tolerations", [])):
        faults.append(f"{at}/tolerations: none for nodes with GPUs")
    return faults + _hook_faults(at, pod, "--drain-now")


def hook(pod: Document) -> list[str]:
    """The command that Kubernetes runs before it ends a pod."""
    return pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])


def _hook_faults(at: str, pod: Document, flag: str) -> Faults:
    *command, seconds = hook(pod) or [""]
    if command != ["python", "cluster/spot_watcher.py", flag] or not seconds.isdigit():
        return [f"{at}/containers/0/lifecycle: spot_watcher.py {flag} does not run before the pod ends"]
    if pod.get("terminationGracePeriodSeconds", 30) < int(seconds) + 10:
        return [f"{at}/terminationGracePeriodSeconds: less than the hook takes"]
    return []


def _pod_rule_faults(at: str, pod: Document) -> Faults:
    container = pod["containers"][0]
    security = container.get("securityContext", {})
    shm = [each for each in pod.get("volumes", []) if each.get("emptyDir", {}).get("medium") == "Memory"]
    mounted = {each["name"] for each in container.get("volumeMounts", []) if each["mountPath"] == "/dev/shm"}
    wanted = {
        "serviceAccountName": bool(pod.get("serviceAccountName")),
        "restartPolicy": pod.get("restartPolicy") == "Never",
        "containers/0/image": re.fullmatch(IMAGE, container["image"]) is not None,
        "containers/0/securityContext": security.get("runAsNonRoot") is True
        and security.get("allowPrivilegeEscalation") is False,
        "volumes": any(each["name"] in mounted and "sizeLimit" in each["emptyDir"] for each in shm),
        "containers/0/env": not [
            each for each in container.get("env", []) if re.search("KEY|SECRET|TOKEN", each["name"])
        ],
    }
    return [f"{at}/{key}: not as it must be" for key, right in wanted.items() if not right]


def _job_faults(spec: Document) -> Faults:
    faults = []
    if not spec.get("shutdownAfterJobFinishes"):
        faults.append("spec/shutdownAfterJobFinishes: the cluster would stay")
    template = spec.get("submitterPodTemplate", {})
    if not admits(POLICY, template.get("metadata", {}).get("labels", {}), JOB_SERVER):
        faults.append("spec/submitterPodTemplate: networkpolicy.yaml does not let it submit")
    if "--out s3://" not in spec["entrypoint"]:
        faults.append("spec/entrypoint: results must outlive the cluster")
    return faults


def faults(document: Document) -> Faults:
    """What is wrong with a file, by the first check that finds something: each relies on those before it."""
    return schema_faults(document) or pod_faults(document) or rule_faults(document)
