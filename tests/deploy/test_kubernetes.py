"""The Kubernetes manifests against Kubernetes' schemas, and against what the services are."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from torch.distributed.run import get_args_parser

from serving.standard_services.health import LIVENESS
from tests.deploy.conftest import Pod, ReadSettings
from tests.deploy.kustomize import Manifest, pod_templates

# The oldest with `sleep` in preStop, and the newest that is known.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
# Kubernetes has no schema for these; for the pods that they start it has.
CUSTOM_KINDS = {"LeaderWorkerSet", "PodMonitor"}


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_what_kubernetes_accepts(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] in CUSTOM_KINDS:
            for template in pod_templates(manifest):
                _validate(json.dumps({"apiVersion": "v1", "kind": "Pod", **template}), version)
        else:
            _validate(json.dumps(manifest), version)


def test_settings_are_ones_that_the_services_accept(
    pods: list[Pod], read_settings: ReadSettings
) -> None:
    for pod in pods:
        read_settings(pod.service, pod.environment)


def test_shutdown_waits_for_the_grace_period(pods: list[Pod], read_settings: ReadSettings) -> None:
    for pod in pods:
        grace = read_settings(pod.service, pod.environment).grace_period
        stop = pod.container.get("lifecycle", {}).get("preStop", {})
        pause = stop.get("sleep", {"seconds": 0})["seconds"]
        allowed = pod.spec["terminationGracePeriodSeconds"]
        # A worker shard has no streams of its own: it waits for its leader to finish.
        assert allowed > pause + (0 if pod.component == "model-worker" else grace)


def test_worker_shards_outlive_the_streams_of_their_leader(
    pods: list[Pod], read_settings: ReadSettings
) -> None:
    for pod in pods:
        if pod.component == "model-worker":
            grace = read_settings(pod.service, pod.environment).grace_period
            assert pod.container["lifecycle"]["preStop"]["sleep"]["seconds"] > grace


def test_torchrun_is_started_with_flags_that_it_has(
    pods: list[Pod], read_settings: ReadSettings
) -> None:
    for pod in pods:
        if "command" in pod.container:
            assert pod.container["command"] == ["torchrun"]
            given = [each.replace("$(LWS_WORKER_INDEX)", "1") for each in pod.container["args"]]
            arguments = get_args_parser().parse_args(given)
            assert (arguments.module, arguments.training_script) == (True, "model_service")
            limits = pod.container["resources"]["limits"]
            assert arguments.nproc_per_node == limits["nvidia.com/gpu"]
            grace = read_settings(pod.service, pod.environment).grace_period
            assert arguments.shutdown_timeout > grace


def test_only_shards_reach_the_ports_of_shards(manifests: list[Manifest], pods: list[Pod]) -> None:
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    for pod in pods:
        if "command" not in pod.container:  # all of its shards are in one pod, on loopback
            continue
        own = [each for each in policies if _selects(each["podSelector"], pod.labels)]
        assert any("Ingress" in each["policyTypes"] for each in own)
        rules = [rule for each in own for rule in each.get("ingress", [])]
        beyond_grpc = [rule for rule in rules if rule.get("ports") != [{"port": 50053}]]
        assert beyond_grpc
        for source in (source for rule in beyond_grpc for source in rule["from"]):
            assert source.keys() == {"podSelector"}  # of this namespace
            allowed = {
                each.service for each in pods if _selects(source["podSelector"], each.labels)
            }
            assert allowed == {"model"}


def test_probes_ask_a_port_that_answers_them(pods: list[Pod], read_settings: ReadSettings) -> None:
    for pod in pods:
        settings = read_settings(pod.service, pod.environment)
        # Kubernetes' probes know no TLS.
        port = settings.port if settings.tls_cert is None else settings.health_port
        probes = [value for name, value in pod.container.items() if name.endswith("Probe")]
        assert bool(probes) == (pod.component != "model-worker")
        for probe in probes:
            assert probe["grpc"]["port"] == port
            assert probe["grpc"].get("service", "") in {"", LIVENESS}


def test_metrics_port_is_the_one_that_prometheus_looks_for(
    pods: list[Pod], read_settings: ReadSettings
) -> None:
    for pod in pods:
        ports = {port["name"]: port["containerPort"] for port in pod.container.get("ports", [])}
        assert ports.get("metrics") == read_settings(pod.service, pod.environment).metrics_port


def test_files_that_settings_name_are_in_volumes(pods: list[Pod]) -> None:
    for pod in pods:
        mounts = [f"{mount['mountPath']}/" for mount in pod.container["volumeMounts"]]
        for name, value in pod.environment.items():
            if value.startswith("/") and not value.startswith("/demo/"):
                assert value.startswith(tuple(mounts)), f"{name}={value}"


def test_gateway_without_a_model_is_not_restarted(pods: list[Pod]) -> None:
    [gateway] = [pod for pod in pods if pod.component == "gateway"]
    assert gateway.container["livenessProbe"]["grpc"]["service"] == LIVENESS
    assert "service" not in gateway.container["readinessProbe"]["grpc"]


def test_model_has_a_proper_name(pods: list[Pod], read_settings: ReadSettings) -> None:
    for pod in pods:
        if pod.service == "model":
            settings: Any = read_settings(pod.service, pod.environment)
            assert (settings.model_name or settings.ckpt_dir.name) != "checkpoint"


def test_model_may_take_half_an_hour_to_load(pods: list[Pod]) -> None:
    [model] = [pod for pod in pods if pod.component == "model"]
    probe = model.container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 30 * 60


def test_pods_run_without_root_or_privileges(pods: list[Pod]) -> None:
    for pod in pods:
        whole, own = pod.spec["securityContext"], pod.container["securityContext"]
        assert whole["runAsNonRoot"]
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not pod.spec["automountServiceAccountToken"]


def test_kubernetes_adds_no_variables_that_read_as_settings(pods: list[Pod]) -> None:
    for pod in pods:
        assert pod.spec["enableServiceLinks"] is False


def test_every_selector_finds_pods(manifests: list[Manifest], pods: list[Pod]) -> None:
    for manifest in manifests:
        for selector in _selectors(manifest.get("spec", {})):
            assert any(_selects(selector, pod.labels) for pod in pods), (manifest, selector)


def test_gateway_finds_its_services_by_name(
    manifests: list[Manifest], pods: list[Pod], read_settings: ReadSettings
) -> None:
    ports = {
        each["metadata"]["name"]: each["spec"]["ports"][0]["port"]
        for each in manifests
        if each["kind"] == "Service"
    }
    [gateway] = [pod for pod in pods if pod.component == "gateway"]
    assert gateway.environment["CHASQUI_MODEL_TARGETS"].startswith("dns:///")
    variables = {"CHASQUI_TOKENIZER_TARGET", "CHASQUI_MODEL_TARGETS", "CHASQUI_SAFETY_TARGET"}
    assert ("safety" in {pod.component for pod in pods}) == (
        "CHASQUI_SAFETY_TARGET" in gateway.environment
    )
    for target in variables & gateway.environment.keys():
        name, _, port = gateway.environment[target].removeprefix("dns:///").rpartition(":")
        assert ports[name] == int(port)
        component = name.removeprefix("chasqui-")
        [pod] = [pod for pod in pods if pod.component == component]
        assert read_settings(pod.service, pod.environment).port == int(port)


def test_no_two_services_share_a_secret(pods: list[Pod]) -> None:
    secrets = [
        volume["secret"]["secretName"]
        for pod in pods
        for volume in pod.spec["volumes"]
        if "secret" in volume
    ]
    assert len(secrets) == len(set(secrets))


def test_gateway_expects_of_each_service_the_name_that_it_calls(pods: list[Pod]) -> None:
    assert all("CHASQUI_UPSTREAM_NAME" not in pod.environment for pod in pods)


def test_volumes_that_are_mounted_exist(manifests: list[Manifest], pods: list[Pod]) -> None:
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for mount in pod.container["volumeMounts"]:
            assert mount["name"] in volumes
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
                assert claim["readOnly"]


def test_budgets_and_autoscalers_are_for_what_exists(manifests: list[Manifest]) -> None:
    present = {(each["kind"], each["metadata"]["name"]): each for each in manifests}
    for manifest in manifests:
        if manifest["kind"] == "HorizontalPodAutoscaler":
            target = manifest["spec"]["scaleTargetRef"]
            scaled = present[target["kind"], target["name"]]
            assert "replicas" not in scaled["spec"]


@functools.cache  # builds have most of their manifests in common
def _validate(manifest: str, version: str) -> None:
    kubernetes_validate.validate(json.loads(manifest), version, strict=True)


def _selectors(value: Any) -> Iterator[Manifest]:
    """All selectors of pods below a value."""
    if isinstance(value, list):
        for each in value:
            yield from _selectors(each)
    elif isinstance(value, dict):
        if value.keys() & {"matchLabels", "matchExpressions"}:
            yield value
        for name, each in value.items():
            if name == "namespaceSelector":
                continue
            plain = name == "selector" and not each.keys() & {"matchLabels", "matchExpressions"}
            yield from [{"matchLabels": each}] if plain else _selectors(each)


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return all(labels.get(name) == value for name, value in wanted.items()) and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )
