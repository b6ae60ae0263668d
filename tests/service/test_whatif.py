# SPDX-License-Identifier: Apache-2.0
"""Policies replayed from the audit log decide as the server does."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from click.testing import CliRunner, Result

from detector import Detector, Policy, fit
from detector.calibration import Guarantee
from detector.cli import Commands
from detector.scores import FitOptions
from service import Settings
from service.audit import Audit
from service.cli.whatif import whatif
from service.whatif import Asked, replay
from tests.helpers import ROOT, encoded, toy_dataset, toy_images, toy_model, toy_network
from tests.service.conftest import serving
from tests.service.test_admin import BOSS
from tests.service.test_security import bearer, sha256

# Ordinary images with more and more of another one in them: decisions of both kinds, and p-values between.
IMAGES = [
    encoded(((1 - share) * image + share * other).astype(np.uint8))
    for share in (0.0, 0.2, 0.35, 0.5)
    for image, other in zip(toy_images(30, seed=70)[0], toy_images(30, seed=71)[0][::-1], strict=True)
]
LOOSE = {"target_id_acceptance": 0.8, "guarantee": {"kind": "simultaneous", "delta": 0.05}}
POLICIES: dict[str, dict[str, Any]] = {
    "own": {},
    "another score": {"score_name": "knn"},
    "another target and score": LOOSE | {"score_name": "fdbd"},
    "two reasons": LOOSE | {"alpha_conf": 0.1},
}


def asked(policy: dict[str, Any]) -> Asked:
    guarantee = policy.get("guarantee", {})
    return Asked(
        target=policy.get("target_id_acceptance"),
        score=policy.get("score_name"),
        guarantee=guarantee.get("kind"),
        delta=guarantee.get("delta"),
        alpha_conf=policy.get("alpha_conf"),
    )


Decided = Callable[[str], tuple[Path, list[str]]]


@pytest.fixture(scope="module")
def served(toy_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Decided:
    """The audit log and the decisions of a server under one of POLICIES, over the same images."""
    known: dict[str, tuple[Path, list[str]]] = {}

    def decide(name: str) -> tuple[Path, list[str]]:
        if name not in known:
            state = tmp_path_factory.mktemp("state")
            known[name] = state / "audit" / "audit.jsonl", list(_decisions(toy_models, state, POLICIES[name]))
        return known[name]

    return decide


def _decisions(models: Path, state: Path, policy: dict[str, Any]) -> Iterator[str]:
    tokens = {"even": sha256("0"), "odd": sha256("1")}
    with serving(Settings(models=models, state_dir=state, tokens=tokens, admin_token_sha256=sha256("boss"))) as running:
        if policy:
            body = Policy(**({"score_name": "grood"} | policy)).model_dump()
            assert running.client.put("/v1/models/toy/policy", json=body, headers=BOSS).status_code == 200
        for number, image in enumerate(IMAGES):
            answer = running.client.post("/v1/verdict", content=image, headers=bearer(str(number % 2)))
            yield answer.json()["decision"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(Commands(commands={"whatif": whatif}), ["whatif", *map(str, arguments)])


@pytest.mark.parametrize("name", POLICIES)
def test_the_policy_that_was_in_force_gives_every_recorded_decision_again(
    served: Decided, toy_models: Path, name: str
) -> None:
    log, decisions = served(name)
    result = replay([log], toy_models, asked(POLICIES[name]))
    assert result.all.images == len(IMAGES)
    assert result.all.deferred_then == decisions.count("defer")
    assert 0 < result.all.deferred_then < len(IMAGES)
    assert (result.all.accept_to_defer, result.all.defer_to_accept) == (0, 0)


@pytest.mark.parametrize(("then", "now"), [(a, b) for a in POLICIES for b in POLICIES if a != b])
def test_another_policy_gives_what_the_server_would_decide(
    served: Decided, toy_models: Path, then: str, now: str
) -> None:
    (log, before), (_, after) = served(then), served(now)
    result = replay([log], toy_models, asked(POLICIES[now]))
    pairs = list(zip(before, after, strict=True))
    assert result.all.accept_to_defer == pairs.count(("accept", "defer"))
    assert result.all.defer_to_accept == pairs.count(("defer", "accept"))
    assert result.by_caller["even"].as_dict()["deferred_now"] == after[::2].count("defer")
    assert result.by_caller["odd"].images == len(IMAGES) // 2
    assert result.by_model["toy 1"] == result.all


def test_a_guarantee_asked_for_by_its_kind_alone_is_the_one_that_the_server_then_keeps(tmp_path: Path) -> None:
    own = toy_model(tmp_path / "toy" / "1", policy=Policy(guarantee=Guarantee(delta=0.01))).policy
    change = {"target_id_acceptance": 0.9, "guarantee": {"kind": "simultaneous"}}
    with serving(Settings(models=tmp_path, state_dir=tmp_path / "state", admin_token_sha256=sha256("boss"))) as running:
        assert running.client.put("/v1/models/toy/policy", json=change, headers=BOSS).status_code == 200
        assert running.client.get("/v1/models/toy/policy").json() == asked(change).of(own).model_dump()


def test_every_class_keeps_its_own_threshold(tmp_path: Path) -> None:
    fit(
        toy_network(),
        toy_dataset(300, seed=1),
        toy_dataset(600, seed=2),
        tmp_path / "toy" / "1",
        tune=toy_dataset(600, seed=3),
        options=FitOptions(num_classes=4, bank_size=200, mixup_images=40),
        policy=Policy(guarantee=Guarantee(kind="marginal")),
        per_class=True,
    )
    detector = Detector.load(tmp_path / "toy" / "1", device="cpu")
    decider = detector.with_policy(detector.manifest.policy.model_copy(update={"score_name": "knn"}))
    assert len({cut.value for cut in decider.thresholds}) == 4
    outputs = detector.outputs(IMAGES)
    then, now = detector.judge(outputs), detector.judge(outputs, decider)
    log = tmp_path / "audit.jsonl"
    names = {"caller": "c", "model": "toy", "version": "1", "digest": detector.manifest.model_digest}
    log.write_bytes(
        b"\n".join(
            orjson.dumps({"event": "decision", "precision": "fp32"} | names | asdict(verdict)) for verdict in then
        )
    )
    result = replay([log], tmp_path, Asked(score="knn")).all
    pairs = [(before.decision, after.decision) for before, after in zip(then, now, strict=True)]
    assert result.accept_to_defer == pairs.count(("accept", "defer"))
    assert result.defer_to_accept == pairs.count(("defer", "accept")) > 0


def test_policies_that_are_compared_do_differ(served: Decided) -> None:
    decisions = {tuple(served(name)[1]) for name in POLICIES}
    assert len(decisions) == len(POLICIES)
    lines = served("two reasons")[0].read_text().splitlines()
    assert {"ood", "low_confidence"} < {json.loads(line).get("reason") for line in lines}


def test_the_table_and_the_json_tell_the_same(served: Decided, toy_models: Path) -> None:
    log, _ = served("own")
    arguments = ("--audit", log, "--models", toy_models, "--target", "0.9", "--score", "grood_norm")
    table, document = run(*arguments), json.loads(run(*arguments, "--json").output)
    assert table.exit_code == 0, table.output
    assert document["policies"]["toy 1"]["guarantee"] == {"kind": "simultaneous", "delta": 0.05}
    assert "toy 1: grood_norm, target 0.9, simultaneous with delta 0.05" in table.output
    for name in ("toy 1", "even", "odd"):
        (row,) = [line for line in table.output.splitlines() if line.startswith(f"  {name} ")]
        numbers = (document["by_model"] | document["by_caller"])[name]
        assert row.split()[-5:] == [str(number) for number in numbers.values()]
    assert document["images"] == len(IMAGES)
    assert document["deferred_now"] == (
        document["deferred_then"] + document["accept_to_defer"] - document["defer_to_accept"]
    )


def test_rotated_files_are_read_together(served: Decided, toy_models: Path) -> None:
    log, other = served("own")[0], served("another score")[0]
    assert json.loads(run("--audit", log, other, "--models", toy_models, "--json").output)["images"] == 2 * len(IMAGES)


def test_broken_lines_are_skipped_and_told(served: Decided, toy_models: Path, tmp_path: Path) -> None:
    whole = served("own")[0].read_bytes()
    log = tmp_path / "audit.jsonl"
    log.write_bytes(whole + whole.splitlines()[0][:-40])
    result = run("--audit", log, "--models", toy_models)
    assert result.exit_code == 0
    assert f"skipped: 1 lines that are no audit lines, the first at {log}:{len(IMAGES) + 1}" in result.output
    assert json.loads(run("--audit", log, "--models", toy_models, "--json").output)["images"] == len(IMAGES)
    log.write_text('{"event": "decision"}\n[1]\nnull\n')
    assert "no decision that can be read" in run("--audit", log, "--models", toy_models).output


def test_a_line_that_a_crash_cut_short_takes_none_after_it_along(
    served: Decided, toy_models: Path, tmp_path: Path
) -> None:
    line = json.loads(served("own")[0].read_text().splitlines()[0])
    (tmp_path / "audit.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:-40])
    for _ in range(2):
        audit = Audit(tmp_path, max_bytes=2**20, keep=1)
        audit.write(line)
        audit.close()
    result = replay([tmp_path / "audit.jsonl"], toy_models, Asked())
    assert (result.all.images, result.broken) == (3, [f"{tmp_path / 'audit.jsonl'}:2"])


def test_decisions_of_other_models_are_counted_and_told(served: Decided, toy_models: Path, tmp_path: Path) -> None:
    log = served("own")[0]
    first = json.loads(log.read_text().splitlines()[0])
    mixed = tmp_path / "audit.jsonl"
    mixed.write_text(log.read_text() + json.dumps(first | {"digest": "sha256:other"}) + "\n")
    assert "skipped: 1 decisions of sha256:other" in run("--audit", mixed, "--models", toy_models).output
    (tmp_path / "empty").mkdir()
    alone = run("--audit", mixed, "--models", tmp_path / "empty")
    assert alone.exit_code == 1
    assert "--models" in alone.output
    assert "sha256:other" in alone.output


def test_a_model_that_was_refitted_under_its_number_is_another_model(
    served: Decided, toy_models: Path, tmp_path: Path
) -> None:
    toy_model(tmp_path / "toy" / "1", policy=Policy(target_id_acceptance=0.9))
    assert run("--audit", served("own")[0], "--models", tmp_path).exit_code == 1


def test_a_score_that_was_not_recorded_is_refused_with_those_that_were(served: Decided, toy_models: Path) -> None:
    result = run("--audit", served("own")[0], "--models", toy_models, "--score", "knn_of_another_day")
    assert result.exit_code == 1
    assert "no line recorded the score knn_of_another_day; recorded: " in result.output
    assert "grood_norm" in result.output


def test_lines_whose_shadows_were_sampled_out_are_skipped_and_told(
    served: Decided, toy_models: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in served("own")[0].read_text().splitlines()]
    for line in lines[:7]:
        line["ood"]["shadow"] = {}
    log = tmp_path / "audit.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("--audit", log, "--models", toy_models, "--score", "grood_norm")
    assert "skipped: 7 decisions of toy 1 without grood_norm; recorded: fdbd, " in result.output


def test_a_score_that_was_no_number_is_deferred_as_the_server_did(
    served: Decided, toy_models: Path, tmp_path: Path
) -> None:
    line = json.loads(served("own")[0].read_text().splitlines()[0])
    line["ood"]["score"], line["decision"] = None, "defer"
    log = tmp_path / "audit.jsonl"
    log.write_text(json.dumps(line) + "\n")
    assert replay([log], toy_models, Asked()).all.as_dict()["deferred_now"] == 1


def test_a_policy_that_the_server_would_refuse_is_refused(served: Decided, toy_models: Path) -> None:
    arguments = ("--audit", served("own")[0], "--models", toy_models)
    moved = run(*arguments, "--target", "0.9", "--guarantee", "pac")
    assert (moved.exit_code, "simultaneous" in moved.output) == (1, True)
    assert "too_few_samples" in run(*arguments, "--target", "0.9999").output


def test_the_command_is_announced() -> None:
    announced = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["oodgate.commands"]
    assert EntryPoint("whatif", announced["whatif"], "oodgate.commands").load() is whatif
