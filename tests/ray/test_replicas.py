# SPDX-License-Identifier: Apache-2.0
"""What replicas on Ray have in common, and what the configuration of a cluster says. `make test-ray` runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed; `make test-ray` brings it")

from ray.serve.schema import ServeDeploySchema  # noqa: E402

from benchmarks.scaling.cluster import machine, serving  # noqa: E402
from detector.artifact import read_manifest  # noqa: E402
from service.cli.drift import drift  # noqa: E402
from service.errors import ServiceError  # noqa: E402
from service.ray_serve import replica_app  # noqa: E402
from service.settings import Settings  # noqa: E402
from tests.helpers import EMBEDDED, GOOD, ROOT  # noqa: E402

REQUESTS = 60
CONFIGS = {path.stem: path for path in sorted((ROOT / "deploy" / "ray").glob("*.yaml"))}


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, object]]]]:
    """The state folder of two replicas that have stopped, and the policies by which they answered."""
    state = tmp_path_factory.mktemp("ray-state")
    settings = {
        "OODGATE_MODELS": str(EMBEDDED.parents[1]),
        "OODGATE_STATE_DIR": str(state),
        "OODGATE_ALLOW_OPEN": "true",
        "OODGATE_COMPILE": "off",
        "OODGATE_DECODE_THREADS": "1",
        "OODGATE_TORCH_THREADS": "1",
    }
    with machine(**settings):
        with serving(2) as url, httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(REQUESTS):
                client.post("/v1/verdict", content=GOOD, headers={"content-type": "image/png"}).raise_for_status()
            policies = [client.get("/v1/models/cifar10/policy").raise_for_status().json() for _ in range(20)]
        yield state, policies


def test_drift_states_of_both_replicas_add_up_to_all_that_was_judged(
    gone: tuple[Path, list[dict[str, object]]],
) -> None:
    folders = sorted(gone[0].glob("replica-*"))
    assert [folder.name for folder in folders] == ["replica-0", "replica-1"]
    run = CliRunner().invoke(drift, [str(EMBEDDED), *map(str, folders), "--json"])
    assert run.exit_code == 0, run.output
    merged = json.loads(run.output)["all"]
    assert (merged["images"], merged["replicas"]) == (REQUESTS, 2)


def test_every_replica_has_the_policy_of_the_manifest(gone: tuple[Path, list[dict[str, object]]]) -> None:
    expected = read_manifest(EMBEDDED).policy.model_dump(mode="json")
    for policy in gone[1]:
        assert {name: policy[name] for name in expected} == expected


def test_a_policy_that_would_reach_one_replica_only_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODGATE_ADMIN_TOKEN_SHA256", 64 * "0")
    monkeypatch.setenv("OODGATE_ALLOW_OPEN", "true")
    with pytest.raises(ServiceError, match="Release a new version"):
        replica_app()


def config(name: str) -> tuple[dict[str, Any], dict[str, Any], Settings]:
    """A configuration, the options of its deployment, and the settings that its replicas get."""
    whole: dict[str, Any] = yaml.safe_load(CONFIGS[name].read_text())
    [application] = whole["applications"]
    [options] = application["deployments"]
    variables = application["runtime_env"]["env_vars"]
    named = {key.removeprefix("OODGATE_").lower(): value for key, value in variables.items() if "OODGATE_" in key}
    return whole, options, Settings(host="0.0.0.0", **named)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_one_that_ray_reads_and_the_service_too(name: str) -> None:
    whole, options, settings = config(name)
    [application] = ServeDeploySchema.model_validate(whole).applications
    assert [deployment.name for deployment in application.deployments] == ["Oodgate"]
    assert application.import_path == "service.ray_serve:application"
    assert options["graceful_shutdown_timeout_s"] > settings.shutdown_grace_s
    assert whole["http_options"]["request_timeout_s"] > settings.request_timeout_s


def test_a_cluster_shares_its_cores_out_and_grows_by_whole_batches() -> None:
    _, options, settings = config("serve_config")
    assert settings.decode_threads + settings.torch_threads == options["ray_actor_options"]["num_cpus"]
    assert options["autoscaling_config"]["target_ongoing_requests"] == 2 * settings.max_batch  # of a CPU
    assert not settings.allow_open


def test_one_machine_has_two_replicas_on_the_cores_that_the_document_gives_ray() -> None:
    whole, options, settings = config("one_machine")
    [cores] = re.findall(r"ray start --head --num-cpus (\d+)", (ROOT / "docs" / "scaling.md").read_text())
    assert options["num_replicas"] == 2
    assert options["ray_actor_options"] == {"num_cpus": int(cores) // options["num_replicas"]}
    assert settings.torch_threads == options["ray_actor_options"]["num_cpus"]
    assert not settings.allow_open or whole["http_options"]["host"] == "127.0.0.1"
