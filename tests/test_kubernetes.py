# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes manifests, rendered by kubectl and held against the real schemas and against the service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = ["cpu", "nvidia", "keda"]
# The oldest Kubernetes that is still maintained, and the newest whose schemas there are.
VERSIONS = ["1.35", "1.37"]
Resource = dict[str, Any]

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
each_model_store = pytest.mark.parametrize("store", ["model-s3", "model-oci"])


def kubectl() -> str:
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "kubectl is missing: install the extra `dev`"
    return found


def rendered(folder: Path) -> list[Resource]:
    run = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [document for document in yaml.safe_load_all(run.stdout) if document]


@cache
def overlaid(overlay: str) -> tuple[Resource, ...]:
    return tuple(rendered(KUBERNETES / "overlays" / overlay))


def with_store(store: str, tmp_path: Path) -> list[Resource]:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    folder = tmp_path / "kubernetes" / "overlays" / "mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["../cpu"], "components": [f"../../components/{store}"]})
    )
    return rendered(folder)


def inference_service() -> Resource:
    document: Resource = yaml.safe_load((KUBERNETES / "kserve" / "inferenceservice.yaml").read_text())
    return document


def of_kind(resources: tuple[Resource, ...] | list[Resource], kind: str) -> Resource:
    [found] = [resource for resource in resources if resource["kind"] == kind]
    return found


def pod_of(overlay: str) -> Resource:
    pod: Resource = of_kind(overlaid(overlay), "Deployment")["spec"]["template"]["spec"]
    return pod


def all_pods() -> list[tuple[str, Resource]]:
    return [*((name, pod_of(name)) for name in OVERLAYS), ("kserve", inference_service()["spec"]["predictor"])]


each_pod = pytest.mark.parametrize("pod", [pod for _, pod in all_pods()], ids=[name for name, _ in all_pods()])


def environment(pod: Resource) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in pod["containers"][0]["env"]}


def custom_schemas() -> dict[str, Resource]:
    files = (KUBERNETES / "schemas").glob("*.json")
    return {path.name.split(".")[0]: json.loads(path.read_text()) for path in files}


def mistakes(resource: Resource, version: str) -> list[str]:
    schema = custom_schemas().get(resource["kind"])
    if schema is not None:
        return [error.message for error in Draft202012Validator(schema).iter_errors(resource)]
    try:
        kubernetes_validate.validate(resource, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


# --- against the schemas ---


@pytest.mark.parametrize("version", VERSIONS)
@each_overlay
def test_every_resource_follows_its_schema(overlay: str, version: str) -> None:
    assert [mistakes(resource, version) for resource in overlaid(overlay)] == [[]] * len(overlaid(overlay))


@each_model_store
def test_every_resource_of_a_model_store_follows_its_schema(store: str, tmp_path: Path) -> None:
    assert [found for resource in with_store(store, tmp_path) if (found := mistakes(resource, VERSIONS[0]))] == []


def test_inference_service_follows_its_schema() -> None:
    assert mistakes(inference_service(), VERSIONS[0]) == []


def test_pod_of_the_inference_service_follows_the_schema_of_pods() -> None:
    predictor = {
        key: value
        for key, value in inference_service()["spec"]["predictor"].items()
        if key not in ("minReplicas", "maxReplicas")
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": predictor}
    assert mistakes(pod, VERSIONS[0]) == []


@pytest.mark.parametrize("kind", ["Deployment", "HorizontalPodAutoscaler", "ScaledObject", "ServiceMonitor"])
def test_a_misspelt_field_is_found(kind: str) -> None:
    overlay = "keda" if kind == "ScaledObject" else "cpu"
    resource = of_kind(overlaid(overlay), kind)
    assert mistakes(resource | {"spec": resource["spec"] | {"replicaCounts": 2}}, VERSIONS[0])


def fill() -> Resource:
    pod: Resource = yaml.safe_load((KUBERNETES / "fill.yaml").read_text())
    return pod


@pytest.mark.parametrize("version", VERSIONS)
def test_pod_that_fills_the_claim_follows_its_schema(version: str) -> None:
    assert mistakes(fill(), version) == []


# --- what each overlay is for ---


@each_overlay
def test_overlay_scales_by_exactly_one_autoscaler(overlay: str) -> None:
    kinds = [resource["kind"] for resource in overlaid(overlay)]
    wanted = {"keda": "ScaledObject"}.get(overlay, "HorizontalPodAutoscaler")
    assert [kind for kind in kinds if kind in ("ScaledObject", "HorizontalPodAutoscaler")] == [wanted]
    assert "replicas" not in of_kind(overlaid(overlay), "Deployment")["spec"]


@each_overlay
def test_overlay_has_what_every_installation_needs(overlay: str) -> None:
    kinds = {resource["kind"] for resource in overlaid(overlay)}
    assert kinds >= {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"}


def test_nvidia_overlay_gives_each_replica_one_accelerator_and_no_way_round_it() -> None:
    pod = pod_of("nvidia")
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert environment(pod)["OODGATE_DEVICE"] == "cuda"


@each_model_store
def test_model_store_fills_the_folder_that_the_server_reads(store: str, tmp_path: Path) -> None:
    resources = with_store(store, tmp_path)
    pod = of_kind(resources, "Deployment")["spec"]["template"]["spec"]
    [models] = [volume for volume in pod["volumes"] if volume["name"] == "models"]
    assert set(models) == {"name", "emptyDir"}
    assert "models" in [mount["name"] for mount in pod["initContainers"][0]["volumeMounts"]]
    claims = [resource["metadata"]["name"] for resource in resources if resource["kind"] == "PersistentVolumeClaim"]
    assert claims == ["oodgate-state"]


def test_pod_that_fills_the_claim_writes_where_the_server_reads() -> None:
    [to] = fill()["spec"]["volumes"]
    [models] = [volume for volume in pod_of("cpu")["volumes"] if volume["name"] == "models"]
    assert to["persistentVolumeClaim"]["claimName"] == models["persistentVolumeClaim"]["claimName"]
    [mount] = fill()["spec"]["containers"][0]["volumeMounts"]
    assert not mount.get("readOnly")
    assert "labels" not in fill()["metadata"]  # the service must send it nothing


def test_overlay_of_the_document_takes_the_image_from_its_registry(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    [overlay] = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "Kustomization" in block]
    [pushed] = re.findall(r"docker push (\S+)", page)
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    folder = tmp_path / "kubernetes" / "overlays" / "mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(overlay)
    deployment = of_kind(rendered(folder), "Deployment")
    assert [container["image"] for container in deployment["spec"]["template"]["spec"]["containers"]] == [pushed]


# --- against the service ---


@each_pod
def test_environment_names_settings_that_exist(pod: Resource) -> None:
    prefix = "OODGATE_"
    named = [name.removeprefix(prefix).lower() for name in environment(pod) if name.startswith(prefix)]
    assert named
    assert [name for name in named if name not in Settings.model_fields] == []


@each_pod
def test_settings_of_the_pod_are_a_start_without_an_open_door(pod: Resource) -> None:
    given: dict[str, Any] = {
        name.removeprefix("OODGATE_").lower(): value
        for name, value in environment(pod).items()
        if name.startswith("OODGATE_")
    }
    settings = Settings(host="0.0.0.0", **given)
    assert settings.tokens_file is not None
    assert not settings.allow_open


@each_pod
def test_pod_outlives_the_drain_and_the_grace(pod: Resource) -> None:
    settings = environment(pod)
    drain, grace = int(settings["OODGATE_DRAIN_SECONDS"]), int(settings["OODGATE_SHUTDOWN_GRACE_S"])
    assert drain == 5
    assert pod["terminationGracePeriodSeconds"] > drain + grace


@each_pod
@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probe_is_patient_with_a_busy_server(pod: Resource, probe: str) -> None:
    found = pod["containers"][0][probe]
    assert found["failureThreshold"] >= 3
    assert found["timeoutSeconds"] >= 5
    wanted = "live" if probe == "livenessProbe" else "ready"
    assert found["httpGet"]["path"] == f"/v2/health/{wanted}"


@pytest.mark.parametrize(
    "pod", [*(pod for _, pod in all_pods()), fill()["spec"]], ids=[*(name for name, _ in all_pods()), "fill"]
)
def test_container_has_no_more_rights_than_it_needs(pod: Resource) -> None:
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True


@each_pod
def test_pod_runs_as_the_user_of_the_image(pod: Resource) -> None:
    users = re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {str(pod["securityContext"]["runAsUser"])} == set(users)


@each_pod
def test_threads_of_the_server_fit_the_limit_of_cores(pod: Resource) -> None:
    settings = environment(pod)
    threads = int(settings["OODGATE_DECODE_THREADS"]) + int(settings["OODGATE_TORCH_THREADS"])
    assert threads <= int(pod["containers"][0]["resources"]["limits"]["cpu"])


@each_pod
def test_everything_the_server_writes_to_is_a_volume(pod: Resource) -> None:
    mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if not mount.get("readOnly")}
    [state] = re.findall(r"OODGATE_STATE_DIR=(\S+)", (ROOT / "Dockerfile").read_text())
    assert {state, "/tmp"} <= mounted


@each_pod
def test_every_mounted_volume_is_declared(pod: Resource) -> None:
    declared = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= declared


@each_overlay
def test_service_monitor_and_service_select_the_pods(overlay: str) -> None:
    labels = of_kind(overlaid(overlay), "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert of_kind(overlaid(overlay), "Service")["spec"]["selector"].items() <= labels
    for kind in ("PodDisruptionBudget", "ServiceMonitor"):
        assert of_kind(overlaid(overlay), kind)["spec"]["selector"]["matchLabels"].items() <= labels
    assert of_kind(overlaid(overlay), "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels


def test_autoscalers_ask_only_for_metrics_the_service_has() -> None:
    files = [KUBERNETES / "components/hpa/prometheus-adapter.yaml", KUBERNETES / "components/keda/scaledobject.yaml"]
    queries = [line for path in files for line in path.read_text().splitlines() if "{" in line and "#" not in line]
    asked = {name for line in queries for name in re.findall(r"\boodgate_\w+(?={)", line)}
    families = {family.name for family in Metrics().registry.collect()}
    assert {name.removesuffix("_bucket") for name in asked} == {
        "oodgate_queue_depth",
        "oodgate_http_request_duration_seconds",
    }
    assert {name.removesuffix("_bucket") for name in asked} <= families


def test_autoscalers_ask_only_for_labels_that_their_metrics_have() -> None:
    """A selector on a label that is not there finds nothing, and the service would never grow."""
    adapter = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    triggers = of_kind(overlaid("keda"), "ScaledObject")["spec"]["triggers"]
    queries = [rule[part] for rule in adapter for part in ("seriesQuery", "metricsQuery")]
    queries += [trigger["metadata"]["query"] for trigger in triggers]
    # What Prometheus itself adds: Kubernetes' discovery by way of the ServiceMonitor.
    discovered = {"namespace", "pod", "service"}
    own = {sample.name: set(sample.labels) for family in Metrics().registry.collect() for sample in family.samples}
    selectors = [found for query in queries for found in re.findall(r"(oodgate_\w+){([^}]*)}", query)]
    assert len(selectors) == 7
    for name, selector in selectors:
        assert set(re.findall(r"(\w+)!?=", selector)) <= discovered | own[name], (name, selector)


def test_every_schema_says_where_it_comes_from_and_under_which_licence() -> None:
    rows = [line for line in (KUBERNETES / "schemas" / "README.md").read_text().splitlines() if ".json`" in line]
    described = {re.findall(r"`([\w.-]+\.json)`", row)[0]: row for row in rows}
    assert set(described) == {path.name for path in (KUBERNETES / "schemas").glob("*.json")}
    assert all(row.rstrip(" |").endswith("Apache-2.0") and re.search(r"\d+\.\d+\.\d+", row) for row in rows)


def test_horizontal_autoscaler_asks_for_metrics_the_adapter_makes() -> None:
    adapter = yaml.safe_load((KUBERNETES / "components/hpa/prometheus-adapter.yaml").read_text())
    made = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    metrics = of_kind(overlaid("cpu"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert {metric["pods"]["metric"]["name"] for metric in metrics} == made


def test_both_autoscalers_keep_the_same_promise() -> None:
    horizontal = of_kind(overlaid("cpu"), "HorizontalPodAutoscaler")["spec"]
    keda = of_kind(overlaid("keda"), "ScaledObject")["spec"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == horizontal["behavior"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (horizontal["minReplicas"], horizontal["maxReplicas"])


def triggers() -> dict[str, Resource]:
    return {trigger["name"]: trigger for trigger in of_kind(overlaid("keda"), "ScaledObject")["spec"]["triggers"]}


def test_keda_falls_back_as_its_webhook_allows() -> None:
    """CheckFallbackValid of KEDA 2.16: a fallback wants every trigger to say AverageValue; cpu and memory cannot."""
    fallback = of_kind(overlaid("keda"), "ScaledObject")["spec"]["fallback"]
    assert min(fallback["failureThreshold"], fallback["replicas"]) >= 0
    kinds = {(trigger["type"], trigger["metricType"]) for trigger in triggers().values()}
    assert kinds == {("prometheus", "AverageValue")}


SLOW = "oodgate_http_request_duration_seconds_bucket{service='oodgate',method='POST',pod='a',le='%s'}"
DEPTH = "oodgate_queue_depth{service='oodgate',pod='%s'}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="the promtool binary is not installed")
@pytest.mark.parametrize(
    ("series", "average"),
    [
        # 95 % of what takes more than 0.5 s and at most 1 s.
        ({SLOW % "0.5": "0x20", SLOW % "1": "0+9x20", SLOW % "+Inf": "0+9x20"}, 0.975),
        ({SLOW % "0.5": "7x20", SLOW % "1": "7x20", SLOW % "+Inf": "7x20"}, 0.0),
        ({}, 0.0),
    ],
    ids=["slow", "not asked", "never asked"],
)
def test_the_guard_of_keda_averages_to_the_p95_whatever_the_replicas(
    series: dict[str, str], average: float, tmp_path: Path
) -> None:
    replicas = ["a", "b", "c"]
    given = series | {DEPTH % pod: "0x20" for pod in replicas}
    rule = {"record": "asked", "expr": triggers()["p95"]["metadata"]["query"]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "keda", "rules": [rule]}]}))
    expected = [{"labels": "asked", "value": average * len(replicas)}]
    case = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in given.items()],
        "promql_expr_test": [{"expr": "asked", "eval_time": "4m", "exp_samples": expected}],
    }
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": [case]})
    )
    command = ["promtool", "test", "rules", str(tmp_path / "test.yml")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
