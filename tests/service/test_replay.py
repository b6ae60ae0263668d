# SPDX-License-Identifier: Apache-2.0
"""`oodgate replay` against a real server."""

from __future__ import annotations

import asyncio
import hashlib
import tomllib
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from detector.errors import DataError
from service import Settings
from service.cli.replay import replay
from service.replay import Mix, Replay, images_below, stream
from tests.e2e.server import free_port
from tests.helpers import ROOT, encoded, photo, toy_images
from tests.service.conftest import Running, serving

ID, OOD = [Path("a.png"), Path("b.png")], [Path("o.png")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images as the toy model knows them, and photos that it does not."""
    root = tmp_path_factory.mktemp("images")
    (root / "id" / "deeper").mkdir(parents=True)
    (root / "ood").mkdir()
    for index, image in enumerate(toy_images(20, seed=70)[0]):
        (root / "id" / "deeper" / f"{index}.png").write_bytes(encoded(image))
    for index in range(10):
        (root / "ood" / f"{index}.jpg").write_bytes(encoded(photo(48, 48, index), "JPEG"))
    return root / "id", root / "ood"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(replay, [str(argument) for argument in arguments])


# --- the stream ---


def test_one_seed_gives_one_stream_and_another_another() -> None:
    mix = Mix.parse("0.5")
    first, again, other = (list(islice(stream(ID, OOD, 10, mix.at, seed), 200)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_rate_is_kept_on_average() -> None:
    *_, last = islice(stream(ID, OOD, 50, Mix.parse("0").at, seed=0), 20_000)
    assert last.at == pytest.approx(20_000 / 50, rel=0.03)


def test_the_mix_follows_its_schedule() -> None:
    sendings = list(islice(stream(ID, OOD, 100, Mix.parse("0:0,60:0.2,120:1").at, seed=0), 18_000))
    shares = []
    for start in (0, 60, 120):
        kinds = [sending.kind for sending in sendings if start <= sending.at < start + 60]
        shares.append(kinds.count("ood") / len(kinds))
    assert shares == pytest.approx([0, 0.2, 1], abs=0.02)
    assert all((sending.path in OOD) == (sending.kind == "ood") for sending in sendings)


@pytest.mark.parametrize("text", ["", "0:2", "5:0.1", "0:0,0:1", "0:0,9:0.1,3:1", "a:b", "0:0:0"])
def test_a_mix_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Mix.parse(text)


def test_a_folder_without_images_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=tmp_path.name):
        images_below(tmp_path)


# --- against a server ---


def test_the_server_counts_what_the_replay_says_it_sent(toy_models: Path, folders: tuple[Path, Path]) -> None:
    with serving(Settings(models=toy_models)) as server:
        lines: list[str] = []
        images, strange = (images_below(folder) for folder in folders)
        sender = Replay(server.url, report=lines.append)
        total = asyncio.run(sender.run(stream(images, strange, 60, Mix.parse("0:0,0.5:0.5").at, seed=3), seconds=1.6))
        text = server.client.get("/metrics").text
    counted = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("oodgate_decisions_total{")]
    assert sum(counted) == total.sent == total.answered > 40
    assert total.decided["ood"] > 0
    assert not total.failures
    assert len(lines) == 1
    assert "deferred" in lines[0]


def test_the_command_prints_a_summary(shared_server: Running, folders: tuple[Path, Path]) -> None:
    done = run(
        "--id",
        folders[0],
        "--ood",
        folders[1],
        "--mix",
        0.5,
        "--rate",
        100,
        "--seconds",
        0.5,
        "--url",
        shared_server.url,
    )
    assert done.exit_code == 0, done.output
    assert "total" in done.output.splitlines()[-1]
    assert "p95" in done.output.splitlines()[-1]


def test_a_token_is_sent(toy_models: Path, folders: tuple[Path, Path]) -> None:
    tokens = {"camera": hashlib.sha256(b"secret").hexdigest()}
    arguments = ("--id", folders[0], "--rate", 50, "--seconds", 0.3, "--model", "toy")
    with serving(Settings(models=toy_models, tokens=tokens)) as server:
        refused = run(*arguments, "--url", server.url)
        served = run(*arguments, "--url", server.url, "--token", "secret")
    assert refused.exit_code == 1
    assert "HTTP 401" in refused.output
    assert served.exit_code == 0, served.output


def test_without_a_server_the_command_says_so_and_fails(folders: tuple[Path, Path]) -> None:
    done = run("--id", folders[0], "--rate", 50, "--seconds", 0.2, "--url", f"http://127.0.0.1:{free_port()}")
    assert done.exit_code == 1
    assert "ConnectError" in done.output
    assert "no image got a verdict" in done.output


def test_a_mix_without_ood_images_is_refused(folders: tuple[Path, Path]) -> None:
    done = run("--id", folders[0], "--mix", 0.2)
    assert done.exit_code == 2
    assert "--ood" in done.output


def test_the_oodgate_command_knows_replay() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["oodgate.commands"]["replay"] == "service.cli.replay:replay"
