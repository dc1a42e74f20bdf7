"""Tests for the Kubernetes manifests: they are valid, secure and consistent with the service's settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.support.manifests import DEPLOY, IMAGE, ROOT, SETTINGS, read, secrets_among

KUBERAY = DEPLOY / "kuberay"
KUSTOMIZATION = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())
MANIFESTS = [document for name in KUSTOMIZATION["resources"] for document in read(KUBERAY / name)]
RAY = next(manifest for manifest in MANIFESTS if manifest["kind"] == "RayCluster")
RAY_PORTS = (6379, 8265, 10001, 8000)

# Fields of KubeRay 1.6's RayCluster (ray.io/v1) that these manifests use, with their types, from its API reference.
# Pod templates are validated against the Kubernetes schema instead.
TEXTS = dict[str, str]
FIELDS: dict[str, dict[str, Any]] = {
    "spec": {
        "rayVersion": str,
        "authOptions": dict,
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": dict,
        "headGroupSpec": dict,
        "workerGroupSpecs": list,
    },
    "authOptions": {"mode": {"token", "disabled"}, "secretName": str},
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "idleTimeoutSeconds": int,
        "resources": dict,
        "securityContext": dict,
    },
    "headGroupSpec": {
        "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
        "rayStartParams": TEXTS,
        "template": dict,
    },
    "workerGroupSpecs": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "idleTimeoutSeconds": int,
        "numOfHosts": int,
        "rayStartParams": TEXTS,
        "template": dict,
    },
}
REQUIRED = {
    "spec": {"headGroupSpec"},
    "headGroupSpec": {"template"},
    "workerGroupSpecs": {"groupName", "minReplicas", "maxReplicas", "template"},
}


def titled(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def by_title(title: str) -> dict[str, Any]:
    return next(manifest for manifest in MANIFESTS if titled(manifest) == title)


def templates() -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Yield the name and template of every pod, and the labels that network policies match."""
    for manifest in MANIFESTS:
        if manifest["kind"] in ("Deployment", "Job"):
            template = manifest["spec"]["template"]
            yield manifest["metadata"]["name"], template, template["metadata"]["labels"]
    name = RAY["metadata"]["name"]
    yield "ray-head", RAY["spec"]["headGroupSpec"]["template"], {"ray.io/cluster": name, "ray.io/node-type": "head"}
    for group in RAY["spec"]["workerGroupSpecs"]:
        labels = {"ray.io/cluster": name, "ray.io/node-type": "worker"}
        yield f"ray-{group['groupName']}", group["template"], labels


TEMPLATES = {name: template for name, template, _ in templates()}
LABELS = {name: labels for name, _, labels in templates()}


def environment_of(template: dict[str, Any]) -> dict[str, str]:
    """Return the environment of the first container, without values from Secrets."""
    container = template["spec"]["containers"][0]
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= by_title(f"ConfigMap/{source['configMapRef']['name']}")["data"]
    return values | {entry["name"]: entry["value"] for entry in container.get("env", ()) if "value" in entry}


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("manifest", [m for m in MANIFESTS if m is not RAY], ids=titled)
def test_manifests_match_the_kubernetes_schema(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith("ray-")])
def test_ray_pods_match_the_kubernetes_schema(name: str) -> None:
    pod_template = {"apiVersion": "v1", "kind": "PodTemplate", "template": TEMPLATES[name]}
    kubernetes_validate.validate(pod_template, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("part", FIELDS)
def test_the_ray_cluster_uses_only_fields_that_kuberay_documents(part: str) -> None:
    spec = RAY["spec"]
    for values in spec[part] if part == "workerGroupSpecs" else [spec if part == "spec" else spec[part]]:
        assert REQUIRED.get(part, set()) <= values.keys()
        for name, value in values.items():
            kind = FIELDS[part][name]  # KeyError: KubeRay has no such field, or FIELDS does not list it
            if isinstance(kind, set):
                assert value in kind
            elif kind is TEXTS:
                assert all(isinstance(text, str) for text in value.values()), f"{name}: KubeRay accepts only strings"
            else:
                assert type(value) is kind, name


def test_every_manifest_is_applied() -> None:
    files = {path.name for path in KUBERAY.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == set(KUSTOMIZATION["resources"])
    for manifest in MANIFESTS:
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == KUSTOMIZATION["namespace"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_pods_meet_the_restricted_security_standard(name: str) -> None:
    spec = TEMPLATES[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000  # the user that the images define
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in container["securityContext"]
        assert container["resources"].keys() == {"requests", "limits"}
        if not name.startswith("ray-"):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_autoscaler_sidecar_meets_the_restricted_security_standard() -> None:
    context = RAY["spec"]["autoscalerOptions"]["securityContext"]
    assert (context["runAsNonRoot"], context["allowPrivilegeEscalation"]) == (True, False)
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_every_image_is_pinned_and_listed_in_the_kustomization() -> None:
    images = {container["image"] for template in TEMPLATES.values() for container in template["spec"]["containers"]}
    assert all(IMAGE.fullmatch(image) for image in images)
    assert images == {f"{image['name']}:{image['newTag']}" for image in KUSTOMIZATION["images"]}


def test_no_manifest_contains_a_secret() -> None:
    assert "Secret" not in {manifest["kind"] for manifest in MANIFESTS}
    for template in TEMPLATES.values():
        assert secrets_among(environment_of(template)) == set()


def test_secrets_in_an_environment_are_detected() -> None:
    assert secrets_among({"AMD_DATABASE_URL": "postgresql://amd:secret@db/amd"}) == {"AMD_DATABASE_URL"}
    assert secrets_among({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_TOKEN_PATH": "/x"}) == {"RAY_AUTH_TOKEN"}
    assert secrets_among({"AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL_S3": "http://store:1"}) == {
        "AWS_SECRET_ACCESS_KEY"
    }


def test_every_secret_is_documented() -> None:
    required = {RAY["spec"]["authOptions"]["secretName"]}
    for template in TEMPLATES.values():
        required |= {v["secret"]["secretName"] for v in template["spec"]["volumes"] if "secret" in v}
        for container in template["spec"]["containers"]:
            references = [entry["valueFrom"]["secretKeyRef"] for entry in container.get("env", ())]
            required |= {reference["name"] for reference in references}
    readme = (DEPLOY / "README.md").read_text()
    assert required == {"database", "ray-token", "storage-credentials"}
    assert {name for name in required if f"secret generic {name}" not in readme} == set()


def test_only_the_head_may_call_the_kubernetes_api() -> None:
    assert {name for name, t in TEMPLATES.items() if t["spec"].get("automountServiceAccountToken") is not False} == {
        "ray-head"  # for its autoscaler
    }
    accounts = {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == "ServiceAccount"}
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    assert {t["spec"]["serviceAccountName"] for n, t in TEMPLATES.items() if n != "ray-head"} == accounts.keys()


def test_no_service_is_exposed_outside_the_cluster() -> None:
    assert {m["spec"]["type"] for m in MANIFESTS if m["kind"] == "Service"} == {"ClusterIP"}
    assert RAY["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "Ingress" not in {manifest["kind"] for manifest in MANIFESTS}


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    labels_to_match: dict[str, str] = selector.get("matchLabels", {})
    return labels_to_match.items() <= labels.items()


def reaches(source: dict[str, str], target: dict[str, str], port: int, namespace: dict[str, str] | None = None) -> bool:
    """Return whether the policies let a pod with the labels `source` call `target`.

    `namespace` contains the labels of the caller's namespace; omit it if the caller shares `target`'s namespace.
    """
    policies = [m["spec"] for m in MANIFESTS if m["kind"] == "NetworkPolicy"]
    policies = [policy for policy in policies if matches(policy["podSelector"], target)]
    if not policies:
        return True
    for rule in (rule for policy in policies for rule in policy.get("ingress", ())):
        if "ports" in rule and port not in {entry["port"] for entry in rule["ports"]}:
            continue
        for peer in rule["from"]:
            if "namespaceSelector" in peer:
                if namespace is not None and matches(peer["namespaceSelector"], namespace):
                    return True
            elif namespace is None and matches(peer["podSelector"], source):
                return True
    return False


@pytest.mark.parametrize("port", RAY_PORTS)
@pytest.mark.parametrize("target", [name for name in LABELS if name.startswith("ray-")])
def test_ray_accepts_connections_only_from_ray_and_the_control_plane(target: str, port: int) -> None:
    callers = {name for name, labels in LABELS.items() if reaches(labels, LABELS[target], port)}
    ray = {name for name in LABELS if name.startswith("ray-")}
    control_plane = {"control-plane"} if target == "ray-head" and port in (8265, 8000) else set()
    assert callers == ray | control_plane
    assert not reaches({}, LABELS[target], port)
    for namespace in ({}, {"amd-service/calls": "allowed"}):
        assert not reaches(LABELS["control-plane"], LABELS[target], port, namespace)


def test_the_control_plane_accepts_connections_only_from_labelled_namespaces() -> None:
    target = LABELS["control-plane"]
    assert reaches({}, target, 8400, {"amd-service/calls": "allowed"})
    assert not reaches({}, target, 8400, {"kubernetes.io/metadata.name": "other"})
    assert not [name for name, labels in LABELS.items() if reaches(labels, target, 8400)]


@pytest.mark.parametrize("name", ["control-plane", "migrations"])
def test_the_environment_contains_only_known_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = TEMPLATES[name]
    names = {entry["name"] for entry in template["spec"]["containers"][0]["env"]} | environment_of(template).keys()
    ours = {name for name in names if name.startswith("AMD_")}
    assert ours <= SETTINGS
    for name, value in environment_of(template).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.autoscaling
    assert not settings.migrate  # the migrations job does so
    assert settings.ray_dashboard == f"http://{RAY['metadata']['name']}-head-svc:8265"


def test_paths_in_the_environment_are_mounted() -> None:
    for template in TEMPLATES.values():
        if template is TEMPLATES["migrations"]:
            continue  # it uses only the database
        mounts = {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        files = [v for n, v in environment_of(template).items() if n.endswith(("_FILE", "_DIR"))]
        assert files
        assert all(any(path == mount or path.startswith(f"{mount}/") for mount in mounts) for path in files)


def test_the_control_plane_survives_losing_a_node() -> None:
    deployment, budget = by_title("Deployment/control-plane")["spec"], by_title("PodDisruptionBudget/control-plane")
    assert deployment["replicas"] > budget["spec"]["minAvailable"] >= 1
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert matches(budget["spec"]["selector"], LABELS["control-plane"])
    assert by_title("Service/control-plane")["spec"]["selector"].items() <= LABELS["control-plane"].items()
    container = deployment["template"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_ray_runs_the_tested_version_with_authentication_and_no_tasks_on_the_head() -> None:
    spec = RAY["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert f"ray=={spec['rayVersion']}\n" in (ROOT / "requirements.lock").read_text()
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"gpu", "cpu"}
    gpus = groups["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == 8, "a worker pod is a whole node, so that its ranks share NVLink"
