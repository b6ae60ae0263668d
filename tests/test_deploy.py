# SPDX-License-Identifier: Apache-2.0
"""What an operator copies must fit together, and fit the service."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.source.__main__ import written
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "deploy" / "grafana"
PROVISIONING = GRAFANA / "provisioning"
DASHBOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
PANELS: list[dict[str, Any]] = [panel for board in DASHBOARDS.values() for panel in board["panels"]]
RULES = ROOT / "deploy" / "prometheus" / "rules"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()

each_board = pytest.mark.parametrize("board", DASHBOARDS.values(), ids=DASHBOARDS)
each_panel = pytest.mark.parametrize(
    "panel", [panel for panel in PANELS if panel["type"] != "row"], ids=lambda panel: panel["title"]
)


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


def rules() -> list[dict[str, Any]]:
    return [rule for path in sorted(RULES.glob("*.yml")) for group in loaded(path)["groups"] for rule in group["rules"]]


def metrics_asked_for() -> set[str]:
    """By panels, variables and rules; names that recording rules made are theirs."""
    text = json.dumps(DASHBOARDS) + "".join(str(rule["expr"]) for rule in rules())
    names = re.findall(r"(?<![\w:])oodgate_\w+", text)
    return {re.sub("_(bucket|sum|count)$", "", name) for name in names}


def metrics_of_the_service() -> set[str]:
    families = Metrics().registry.collect()
    return {f"{family.name}_total" if family.type == "counter" else family.name for family in families}


# --- the image ---


def test_image_is_built_from_paths_that_exist() -> None:
    copies = re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert copies
    assert [path for paths in copies for path in paths.split() if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_target_of_the_image_runs_as_a_numbered_user_that_is_not_root(target: str) -> None:
    stage = DOCKERFILE.partition(f"FROM runtime AS {target}\n")[2].partition("\nFROM ")[0]
    [user] = re.findall(r"^USER (\d+):(\d+)$", stage, re.MULTILINE)
    assert "0" not in user


def test_the_last_target_is_the_default_and_has_no_compiler_unless_asked() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert last.startswith("runtime AS cpu\n")
    assert 'ARG COMPILE=""' in last
    assert 'if [ "${COMPILE}" = 1 ]' in last


def test_threads_in_the_image_do_not_spin_while_they_wait() -> None:
    assert "OMP_WAIT_POLICY=PASSIVE" in DOCKERFILE


def test_image_names_no_package_index() -> None:
    assert 'ARG TORCH_INDEX_URL=""' in DOCKERFILE
    assert "https://" not in DOCKERFILE


def test_state_lies_in_a_volume() -> None:
    [volume] = re.findall(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"OODGATE_STATE_DIR={volume}" in DOCKERFILE
    assert volume in {target for _, target in mounts(compose_services()["oodgate"])}


def test_the_build_context_holds_what_the_image_copies_and_no_more() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(?:--chmod=\d+ )?(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert let_in == {path for paths in copies for path in paths.split()}


def test_image_keeps_the_allocator_from_an_arena_for_each_thread() -> None:
    assert "MALLOC_ARENA_MAX=2" in DOCKERFILE


@pytest.mark.parametrize("instruction", ["ENTRYPOINT", "CMD"])
def test_image_starts_without_a_shell_so_that_signals_arrive(instruction: str) -> None:
    [arguments] = re.findall(rf"^{instruction} (.*)$", DOCKERFILE, re.MULTILINE)
    assert isinstance(json.loads(arguments), list)


# --- compose ---


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.cuda.yml"])
def test_compose_files_follow_the_specification(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        name,
    ]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


def test_compose_waits_for_each_service_to_be_healthy() -> None:
    services = compose_services()
    for service in services.values():
        assert "healthcheck" in service
        for name, wanted in service.get("depends_on", {}).items():
            assert name in services
            assert wanted == {"condition": "service_healthy"}


def test_compose_builds_a_target_and_passes_arguments_that_the_image_has() -> None:
    build = compose_services()["oodgate"]["build"]
    override = loaded(ROOT / "docker-compose.cuda.yml")["services"]["oodgate"]
    for target in (build["target"], override["build"]["target"]):
        assert re.search(rf"^FROM .* AS {target}$", DOCKERFILE, re.MULTILINE)
    assert set(build["args"]) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


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


# --- one process for each accelerator ---


def test_each_accelerators_unit_is_a_start_of_its_own_port_state_and_device() -> None:
    unit = (ROOT / "deploy" / "nginx" / "oodgate@.service").read_text()
    variables = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
    for number in ("0", "9"):
        given: dict[str, Any] = {
            name.removeprefix("OODGATE_").lower(): value.replace("%i", number)
            for name, value in variables.items()
            if name.startswith("OODGATE_")
        }
        settings = Settings(host="0.0.0.0", **given)
        assert (settings.port, str(settings.state_dir)) == (8000 + int(number), f"/var/lib/oodgate/{number}")
        assert variables["CUDA_VISIBLE_DEVICES"].replace("%i", number) == number
    [patience] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(patience) > settings.drain_seconds + settings.shutdown_grace_s


# --- Prometheus and Grafana ---


def test_prometheus_scrapes_the_port_the_image_exposes() -> None:
    [job] = loaded(ROOT / "deploy" / "prometheus" / "prometheus.yml")["scrape_configs"]
    [port] = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    assert job["static_configs"] == [{"targets": [f"oodgate:{port}"]}]


def test_prometheus_finds_alertmanager_under_the_name_compose_gives_it() -> None:
    alerting = loaded(ROOT / "deploy" / "prometheus" / "prometheus.yml")["alerting"]
    assert alerting == {"alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]}
    assert "alertmanager" in compose_services()


def test_prometheus_finds_its_rules_where_compose_mounts_them() -> None:
    config = loaded(ROOT / "deploy" / "prometheus" / "prometheus.yml")
    places = dict(mounts(compose_services()["prometheus"]))
    assert config["rule_files"] == ["rules/*.yml"]
    assert places["./deploy/prometheus/rules"] == str(
        Path(places["./deploy/prometheus/prometheus.yml"]).with_name("rules")
    )


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    [source] = loaded(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    config = loaded(ROOT / "deploy" / "prometheus" / "prometheus.yml")
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_grafana_finds_prometheus_under_the_name_compose_gives_it() -> None:
    [source] = loaded(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose_services()


def test_grafana_reads_dashboards_from_where_compose_mounts_them() -> None:
    [provider] = loaded(PROVISIONING / "dashboards" / "oodgate.yaml")["providers"]
    assert ("./deploy/grafana/dashboards", provider["options"]["path"]) in mounts(compose_services()["grafana"])


@each_board
def test_dashboard_opens_on_the_provisioned_data_source(board: dict[str, Any]) -> None:
    [source] = loaded(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    [variable] = [v for v in board["templating"]["list"] if v["type"] == "datasource"]
    assert variable["current"]["value"] == source["uid"] == "oodgate-prometheus"


def test_grafana_opens_a_dashboard_that_is_there() -> None:
    home = compose_services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).stem in DASHBOARDS


# --- alerts ---


def test_alerts_have_the_names_that_people_route_by() -> None:
    assert {rule["alert"] for rule in rules() if "alert" in rule} == {
        "OodgateCalibrationStale",
        "OodgateDeferralRateHigh",
        "OodgateDeferralRateImplausiblyLow",
        "OodgateDriftDetected",
        "OodgateEngineStalled",
        "OodgateErrorRateHigh",
        "OodgateNotReady",
        "OodgateQueueSaturated",
        "OodgateSloBurn",
    }


def test_every_alert_has_a_section_of_the_runbook_and_every_section_an_alert() -> None:
    assert sorted(set(re.findall(r"^## (Oodgate\w+)$", RUNBOOK, re.MULTILINE))) == sorted(
        {rule["alert"] for rule in rules() if "alert" in rule}
    )


@pytest.mark.parametrize("rule", [rule for rule in rules() if "alert" in rule], ids=lambda rule: rule["alert"])
def test_alert_says_how_urgent_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert rule["for"]


@pytest.mark.parametrize(
    "section", re.split(r"^## ", RUNBOOK, flags=re.MULTILINE)[1:], ids=lambda text: text.split()[0]
)
def test_section_of_the_runbook_says_what_to_look_at_and_what_to_do(section: str) -> None:
    for heading in ("**Means.**", "**Look at.**", "**Do.**"):
        assert heading in section


def test_every_alert_has_fixtures_in_which_it_fires_and_in_which_it_must_not() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in (RULES.parent / "tests").glob("*.yml"):
        for case in (case for test in loaded(path)["tests"] for case in test.get("alert_rule_test", [])):
            (fires if case["exp_alerts"] else silent).add(case["alertname"])
    assert fires == silent == {rule["alert"] for rule in rules() if "alert" in rule}


# --- the dashboards ---


def test_dashboards_keep_their_addresses() -> None:
    assert {name: board["uid"] for name, board in DASHBOARDS.items()} == {
        "decisions": "oodgate-decisions",
        "drift": "oodgate-drift",
        "operations": "oodgate-operations",
    }


def test_dashboards_are_what_their_source_writes() -> None:
    committed = {path.name: path.read_text() for path in (GRAFANA / "dashboards").glob("*.json")}
    assert committed == written()


@each_board
def test_dashboard_lets_the_operator_choose_source_model_version_and_instance(board: dict[str, Any]) -> None:
    assert [v["name"] for v in board["templating"]["list"]] == ["datasource", "model", "version", "instance"]


def test_dashboards_and_rules_ask_only_for_metrics_the_service_has() -> None:
    assert metrics_asked_for() - metrics_of_the_service() == set()


@each_board
def test_panel_ids_are_unique(board: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@each_board
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
        return all(a[at] < b[at] + b[size] and b[at] < a[at] + a[size] for at, size in [("x", "w"), ("y", "h")])

    pairs = combinations(board["panels"], 2)
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
    assert panel["type"] in {"heatmap", "stat", "timeseries"}
