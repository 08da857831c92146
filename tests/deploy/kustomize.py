"""The part of kustomize that deploy/kubernetes uses, because PyPI does not have it: resources,
components, generated ConfigMaps, strategic merge patches, images and the namespace. It refuses
everything else, so that nothing is overlooked.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

# By which key strategic merge tells the elements of a list; lists of anything else are replaced.
MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
CLUSTER_WIDE = {"Namespace"}


def build(folder: Path) -> list[Manifest]:
    """The manifests that `kubectl kustomize FOLDER` prints, without the hashes in names."""
    manifests: list[Manifest] = []
    _apply(folder, manifests)
    return manifests


def _apply(folder: Path, manifests: list[Manifest]) -> None:
    # In kustomize's order.
    steps: dict[str, Callable[[Any], None]] = {
        "resources": lambda names: _add(folder, names, manifests),
        "components": lambda names: _apply_components(folder, names, manifests),
        "configMapGenerator": lambda entries: _generate(entries, manifests),
        "patches": lambda entries: _patch(folder, entries, manifests),
        "namespace": lambda name: _place(name, manifests),
        "images": lambda entries: _rename_images(entries, manifests),
    }
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - steps.keys() - {"apiVersion", "kind"}
    assert not unknown, f"{folder}: {unknown} is not understood here"
    for field, step in steps.items():
        if field in kustomization:
            step(kustomization[field])


def _add(folder: Path, names: list[str], manifests: list[Manifest]) -> None:
    for name in names:
        path = folder / name
        found = build(path) if path.is_dir() else _load(path)
        for manifest in found:
            assert _identity(manifest) not in map(_identity, manifests), f"{path}: twice"
            manifests.append(manifest)


def _apply_components(folder: Path, names: list[str], manifests: list[Manifest]) -> None:
    for name in names:
        _apply(folder / name, manifests)


def _load(path: Path) -> list[Manifest]:
    # By way of JSON, as anchors would else make one list or map of many.
    return [json.loads(json.dumps(each)) for each in yaml.safe_load_all(path.read_text())]


def _generate(entries: list[dict[str, Any]], manifests: list[Manifest]) -> None:
    for entry in entries:
        assert entry.keys() <= {"name", "behavior", "literals"}, f"{entry} is not understood here"
        data = dict(literal.split("=", 1) for literal in entry["literals"])
        identity = ("ConfigMap", entry["name"])
        if entry.get("behavior") == "merge":
            _find(identity, manifests)["data"].update(data)
            continue
        metadata = {"name": entry["name"]}
        manifests.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
        )


def _patch(folder: Path, entries: list[dict[str, Any]], manifests: list[Manifest]) -> None:
    for entry in entries:
        assert entry.keys() == {"path"}, f"{entry} is not understood here"
        for patch in _load(folder / entry["path"]):
            _merge(_find(_identity(patch), manifests), patch)


def _merge(target: dict[str, Any], patch: Mapping[str, Any]) -> None:
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        elif name in MERGE_KEYS and name in target:
            _merge_list(target[name], value, MERGE_KEYS[name])
        else:
            target[name] = deepcopy(value)


def _merge_list(target: list[Any], patch: list[Any], key: str) -> None:
    known = {element[key]: element for element in target}
    added = []
    for element in patch:
        if element[key] in known:
            _merge(known[element[key]], element)
        else:
            added.append(deepcopy(element))
    target[:0] = added  # in front, as kustomize does


def _place(namespace: str, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] in CLUSTER_WIDE:
            manifest["metadata"]["name"] = namespace
        else:
            manifest["metadata"]["namespace"] = namespace


def _rename_images(entries: list[dict[str, str]], manifests: list[Manifest]) -> None:
    renamed = {
        entry["name"]: f"{entry.get('newName', entry['name'])}:{entry['newTag']}"
        for entry in entries
    }
    for manifest in manifests:
        for container in containers(manifest):
            container["image"] = renamed.get(container["image"], container["image"])


def pod_templates(manifest: Manifest) -> Iterator[Manifest]:
    """The templates of the pods that a workload starts."""
    match manifest["kind"]:
        case "Deployment" | "StatefulSet":
            yield manifest["spec"]["template"]
        case "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield from (group["leaderTemplate"], group["workerTemplate"])


def containers(manifest: Manifest) -> Iterator[Manifest]:
    """The containers of the pods that a workload starts."""
    for template in pod_templates(manifest):
        yield from template["spec"]["containers"]


def _find(identity: tuple[str, str], manifests: list[Manifest]) -> Manifest:
    [found] = [manifest for manifest in manifests if _identity(manifest) == identity]
    return found


def _identity(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]
