"""KubeRay's RayJob as a JSON schema of the fields that deploy/rayjob.yaml may use, and no others.

The API server silently drops what it does not know, so the check here is strict where the server's is not. Source:
ray-project/kuberay v1.7.0, docs/reference/api.md and ray-operator/config/crd/bases/ray.io_rayjobs.yaml; pods: the core
API of Kubernetes 1.28.
"""

from typing import Any

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "integer", "minimum": 1}
FLAG = {"type": "boolean"}
MAP_OF_TEXT = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def record(required: str = "", **fields: Any) -> dict[str, Any]:
    """An object with these fields only."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def listing(item: dict[str, Any]) -> dict[str, Any]:
    """A list of such items, not empty."""
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    """One of these words."""
    return {"enum": list(values)}


CONTAINER = record(
    "name image resources",
    name=TEXT,
    image=TEXT,
    env=listing(record("name", name=TEXT, value=TEXT)),
    ports=listing(record("containerPort", containerPort=POSITIVE, name=TEXT)),
    resources=record("limits requests", limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=listing(record("mountPath name", mountPath=TEXT, name=TEXT, readOnly=FLAG)),
)
VOLUME = record(
    "name",
    name=TEXT,
    emptyDir=record(medium=TEXT, sizeLimit=QUANTITY),
    persistentVolumeClaim=record("claimName", claimName=TEXT, readOnly=FLAG),
)
POD = record(
    "spec",
    metadata=record(labels=MAP_OF_TEXT, annotations=MAP_OF_TEXT),
    spec=record(
        "containers",
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        securityContext=record(runAsUser=POSITIVE, runAsGroup=POSITIVE, fsGroup=POSITIVE),
        nodeSelector=MAP_OF_TEXT,
        terminationGracePeriodSeconds=COUNT,
        containers=listing(CONTAINER),
        volumes=listing(VOLUME),
    ),
)
RAY_CLUSTER = record(
    "headGroupSpec rayVersion",
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    ),
    authOptions=record(mode=one_of("token", "disabled"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    headGroupSpec=record(
        "template",
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=FLAG,
        rayStartParams=MAP_OF_TEXT,
        template=POD,
    ),
    workerGroupSpecs=listing(
        record(
            "groupName minReplicas maxReplicas template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=MAP_OF_TEXT,
            template=POD,
        )
    ),
)
RAY_JOB = record(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=record("name", name=TEXT, namespace=TEXT, labels=MAP_OF_TEXT),
    spec=record(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        backoffLimit=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=POSITIVE,
        preRunningDeadlineSeconds=POSITIVE,
        runtimeEnvYAML=TEXT,
        suspend=FLAG,
        rayClusterSpec=RAY_CLUSTER,
    ),
)
