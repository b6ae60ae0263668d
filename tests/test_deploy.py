# SPDX-License-Identifier: Apache-2.0
"""What an operator copies must fit together, and fit the service."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "deploy" / "grafana"
PROVISIONING = GRAFANA / "provisioning"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "oodgate.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()

each_panel = pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])


def loaded(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def compose_services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = loaded(ROOT / "docker-compose.yml")["services"]
    return services


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for volume in service.get("volumes", []):
        source, target = volume.split(":")[:2]
        yield source, target


def metrics_asked_for() -> set[str]:
    names = re.findall(r"\boodgate_\w+", json.dumps([PANELS, DASHBOARD["templating"]]))
    return {re.sub("_(bucket|sum|count)$", "", name) for name in names}


def metrics_of_the_service() -> set[str]:
    families = Metrics().registry.collect()
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


# --- the image ---


def test_image_is_built_from_paths_that_exist() -> None:
    copies = re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert copies
    assert [path for paths in copies for path in paths.split() if not (ROOT / path).exists()] == []


def test_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    [user] = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert "0" not in user


@pytest.mark.parametrize("instruction", ["ENTRYPOINT", "CMD"])
def test_image_starts_without_a_shell_so_that_signals_arrive(instruction: str) -> None:
    [arguments] = re.findall(rf"^{instruction} (.*)$", DOCKERFILE, re.MULTILINE)
    assert isinstance(json.loads(arguments), list)


# --- compose ---


def test_compose_mounts_only_files_that_exist() -> None:
    sources = [source for service in compose_services().values() for source, _ in mounts(service)]
    assert [source for source in sources if source.startswith(".") and not (ROOT / source).exists()] == []


def test_compose_declares_every_named_volume() -> None:
    named = {source for service in compose_services().values() for source, _ in mounts(service) if source[0] != "."}
    assert named == set(loaded(ROOT / "docker-compose.yml")["volumes"])


@pytest.mark.parametrize("name", compose_services())
def test_compose_pins_every_image(name: str) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", compose_services()[name]["image"])


def test_compose_gives_oodgate_no_more_rights_than_it_needs() -> None:
    service = compose_services()["oodgate"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


# --- Prometheus and Grafana ---


def test_prometheus_scrapes_the_port_the_image_exposes() -> None:
    [job] = loaded(ROOT / "deploy" / "prometheus" / "prometheus.yml")["scrape_configs"]
    [port] = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    assert job["static_configs"] == [{"targets": [f"oodgate:{port}"]}]


def test_grafana_finds_prometheus_under_the_name_compose_gives_it() -> None:
    [source] = loaded(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose_services()


def test_grafana_reads_dashboards_from_where_compose_mounts_them() -> None:
    [provider] = loaded(PROVISIONING / "dashboards" / "oodgate.yaml")["providers"]
    assert ("./deploy/grafana/dashboards", provider["options"]["path"]) in mounts(compose_services()["grafana"])


def test_dashboard_opens_on_the_provisioned_data_source() -> None:
    [source] = loaded(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    [variable] = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"]
    assert variable["current"]["value"] == source["uid"] == "oodgate-prometheus"


# --- the dashboard ---


def test_dashboard_keeps_its_address() -> None:
    assert DASHBOARD["uid"] == "oodgate-overview"


def test_dashboard_lets_the_operator_choose_source_model_and_version() -> None:
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "model", "version"]


def test_dashboard_asks_only_for_metrics_the_service_has() -> None:
    assert metrics_asked_for() - metrics_of_the_service() == set()


def test_panel_ids_are_unique() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_panels_do_not_overlap() -> None:
    def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
        return all(a[at] < b[at] + b[size] and b[at] < a[at] + a[size] for at, size in [("x", "w"), ("y", "h")])

    pairs = combinations(PANELS, 2)
    assert [(a["title"], b["title"]) for a, b in pairs if overlap(a["gridPos"], b["gridPos"])] == []


@each_panel
def test_panel_says_what_it_shows_and_what_to_do(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 80
    assert panel["fieldConfig"]["defaults"]["unit"]


@each_panel
def test_panel_asks_for_something(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    assert all(target["expr"].strip() for target in panel["targets"])


@each_panel
def test_panel_follows_the_chosen_data_source(panel: dict[str, Any]) -> None:
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert {source["uid"] for source in sources} == {"${datasource}"}


@each_panel
def test_panel_is_of_a_kind_grafana_still_has(panel: dict[str, Any]) -> None:
    assert panel["type"] in {"bargauge", "stat", "timeseries"}
