# SPDX-License-Identifier: Apache-2.0
"""What the documents say is what there is."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import decode, score_cost
from benchmarks.accuracy.marks import MARK
from benchmarks.heat import chosen_of, table
from benchmarks.readme import results
from benchmarks.scaling import table as scaling
from benchmarks.serving import table as serving_table
from benchmarks.serving.results import RESULTS as SERVING
from detector.artifact import read_manifest
from detector.errors import OodgateError
from detector.scores import registry
from service import Settings, create_app
from tests.faults import report
from tests.helpers import EMBEDDED, ROOT
from tests.service.conftest import serving

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])


def error_codes() -> list[str]:
    importlib.import_module("service.errors")

    def below(kind: type[OodgateError]) -> set[str]:
        return {kind.code}.union(*(below(child) for child in kind.__subclasses__()))

    return sorted(below(OodgateError))


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"`OODGATE_{name.upper()}`" in OPERATIONS


def test_no_setting_is_documented_that_there_is_not() -> None:
    named = set(re.findall(r"^\| `OODGATE_([A-Z0-9_]+)`", OPERATIONS, re.MULTILINE))
    assert named == {name.upper() for name in Settings.model_fields}


def test_the_live_metrics_and_their_labels_are_those_of_the_document(toy_models: Path) -> None:
    with serving(Settings(models=toy_models)) as running:
        families = text_string_to_metric_families(running.client.get("/metrics").text)
    live = {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in families
        if family.name.startswith("oodgate_")
    }
    rows = re.findall(r"^\| `(oodgate_\w+)` \|([^|]*)\|", OPERATIONS, re.MULTILINE)
    assert live == {name: set(re.findall(r"\w+", labels)) for name, labels in rows}


@pytest.mark.parametrize("code", error_codes())
def test_every_error_code_is_documented(code: str) -> None:
    assert f"`{code}`" in OPERATIONS


def test_every_endpoint_is_documented_and_no_other() -> None:
    paths = create_app(Settings(models=EMBEDDED.parents[1])).openapi()["paths"]
    ours = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    documented = set(re.findall(r"^\| `((?:GET|POST|PUT) \S+)`", OPERATIONS, re.MULTILINE))
    assert documented == ours | {"GET /openapi.json"}


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_score_has_a_section_that_says_all_of_it(name: str) -> None:
    sections = (ROOT / "docs" / "methods.md").read_text().split("\n## ")
    family = "product_V_U" if name.startswith("product_") else name
    [section] = [part for part in sections if f"`{family}`" in part.splitlines()[0]]
    for part in ("Source.", "Formula.", "Our choices", "State.", "Cost.", "When to use"):
        assert f"**{part}" in section, part


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_deploy_that_a_document_names_is_there(path: Path) -> None:
    named = set(re.findall(r"\bdeploy/[\w./@-]*\w", path.read_text()))
    own = {"deploy/kubernetes/overlays/mine", "deploy/kubernetes/overlays/mine/kustomization.yaml"}  # the reader's
    assert [name for name in sorted(named - own) if not (ROOT / name).exists()] == []


def test_the_readme_lists_every_extra() -> None:
    [paragraph] = [part for part in README.split("\n\n") if "Extras come from the checkout" in part]
    listed = re.findall(r"`(\w+)` for\s", paragraph)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(listed) == sorted(project["optional-dependencies"])


def test_the_readmes_results_are_those_of_the_model() -> None:
    assert results() in README
    assert MARK in results()


def test_the_scaling_page_shows_what_was_measured() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(
        measured() in page
        for measured in (scaling.stages, scaling.bank, scaling.replicas, scaling.index, scaling.recall)
    )


@pytest.mark.parametrize("section", ["stages", "bank", "replicas", "index", "recall"])
def test_every_table_of_the_scaling_page_names_the_command_that_measured_it(section: str) -> None:
    [module] = re.findall(r"`python -m ([\w.]+)", getattr(scaling, section)())
    assert find_spec(module) is not None


def test_the_performance_page_shows_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    assert decode.table(measured) in page
    measured = json.loads((ROOT / "benchmarks" / "results" / "score_cost.json").read_text())
    assert score_cost.table(measured) in page
    assert measured["model"] == read_manifest(EMBEDDED).model_digest
    assert serving_table.section(SERVING) in page


def test_the_heat_maps_compared_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "heat.json").read_text())
    page = (ROOT / "docs" / "console.md").read_text()
    assert table(measured["report"]) in page
    assert measured["chosen"] == chosen_of(measured["choice"]) == "occlusion by the rest of the image"
    pointing = [f"{row['pointing']:.2f}" for row in measured["choice"][measured["chosen"]].values()]
    assert " / ".join(pointing) in page


def test_the_reliability_page_shows_what_was_measured() -> None:
    assert report.table() in (ROOT / "docs" / "reliability.md").read_text()


def test_the_results_page_speaks_of_the_model_that_is_here() -> None:
    digest = json.loads((EMBEDDED / "manifest.json").read_text())["model_digest"]
    assert digest in (ROOT / "docs" / "results.md").read_text()


def test_the_embedded_model_reports_its_accuracy_and_acceptance() -> None:
    manifest = json.loads((EMBEDDED / "manifest.json").read_text())
    measured = manifest["report"]["id"]
    assert measured["accuracy"] >= 0.93
    assert measured["acceptance_interval"][1] >= manifest["policy"]["target_id_acceptance"]
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 60e6
