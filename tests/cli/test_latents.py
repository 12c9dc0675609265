"""`saesteer latents`: flags to pages, and what is printed."""

import json
from pathlib import Path

import pytest

from ..chat_endpoint import serving
from .conftest import Cli

SMALL = ("--tokens", 400, "--context", 32, "--batch-size", 4, "--dtype", "float32")


def test_the_latents_of_a_plan(
    cli: Cli, sae: Path, plan: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pages"
    done = cli("latents", "--sae", sae, "--model", model, "--plan", plan, *SMALL, "-o", out)
    assert done.status == 0, done.err
    assert f"page: {out / 'index.html'}" in done.out.splitlines()[-1]
    document = json.loads((out / "latents.json").read_text())
    ranking = json.loads((plan / "ranking.json").read_text())
    ids = [row["id"] for row in ranking["latents"]]
    assert document["ids"] == ids
    lines = [json.loads(line) for line in (out / "latents.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert [line["tasks"][0]["rank"] for line in lines] == [1, 2, 3]
    assert {line["tasks"][0]["task"] for line in lines} == {"late"}
    assert all(line["steered"] for line in lines)
    page = (out / "latents" / f"{ids[0]}.html").read_text()
    assert "Rankings that hold it" in page and str(plan) in page
    for latent in ids:
        assert str(latent) in done.out
    run = json.loads((out / "run.json").read_text())
    assert run["verb"] == "latents" and run["arguments"]["plan"] == str(plan)


def test_json_is_one_document(cli: Cli, sae: Path, tmp_path: Path) -> None:
    found = cli("latents", "--sae", sae, "--ids", "3,17", "--steer", 0, *SMALL, "--json", "-q",
                "-o", tmp_path / "pages").json()  # fmt: skip
    assert found["ids"] == [3, 17] and found["sae"]["d_sae"] == 64
    assert found == json.loads((tmp_path / "pages/latents.json").read_text())


def test_all_latents_and_an_existing_folder(cli: Cli, sae: Path, tmp_path: Path) -> None:
    words = ("latents", "--sae", sae, "--all", "--steer", 0, *SMALL, "-q", "-o", tmp_path / "p")
    assert cli(*words).status == 0
    assert len(list((tmp_path / "p/latents").iterdir())) == 64
    assert "is not empty" in cli(*words).error(2)
    few = cli(*words[:3], "--top", 2, *words[4:], "--force")
    assert few.status == 0 and len(list((tmp_path / "p/latents").iterdir())) <= 2


def test_a_model_describes(cli: Cli, sae: Path, tmp_path: Path) -> None:
    with serving() as endpoint:
        endpoint.answer = lambda messages: "Description: odd words"
        done = cli("latents", "--sae", sae, "--top", 2, "--steer", 0, *SMALL, "-q",
                   "--describe", endpoint.url, "--describe-model", "small", "-o", tmp_path / "p",
                   "--np-creator", "A. Person")  # fmt: skip
    assert done.status == 0, done.err
    assert "odd words" in done.out
    lines = [json.loads(line) for line in (tmp_path / "p/latents.jsonl").read_text().splitlines()]
    for line in lines:
        assert [one["by"] for one in line["descriptions"]] == ["small", "log-odds"]
    assert "described by small" in (tmp_path / f"p/latents/{lines[0]['id']}.html").read_text()
    assert endpoint.asked[0]["messages"][0]["content"] == "Answer with the number 1."


def test_an_endpoint_that_fails_leaves_nothing(cli: Cli, sae: Path, tmp_path: Path) -> None:
    with serving() as endpoint:
        endpoint.status = 401
        done = cli("latents", "--sae", sae, "--top", 2, *SMALL, "-q", "--describe", endpoint.url,
                   "--describe-model", "small", "-o", tmp_path / "p")  # fmt: skip
    assert "answered HTTP 401" in done.error(1) and "SAESTEER_DESCRIBE_KEY" in done.err
    assert not (tmp_path / "p").exists()


def test_rankings_of_another_sae_are_refused(
    cli: Cli, sae: Path, plan: Path, tmp_path: Path
) -> None:
    other = tmp_path / "ranking"
    other.mkdir()
    document = json.loads((plan / "ranking.json").read_text())
    document["sae"]["sha256"] = "0" * 64
    (other / "ranking.json").write_text(json.dumps(document))
    done = cli("latents", "--sae", sae, "--rankings", other, *SMALL, "-q", "-o", tmp_path / "p")
    assert "ranks latents of" in done.error(1) and "give rankings of this SAE" in done.err


@pytest.mark.parametrize("broken", ['{"sae": {}}', "[]", '{"sae": {"sha256": "x"}}'])
def test_a_broken_ranking_is_one_line(broken: str, cli: Cli, sae: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/ranking.json").write_text(broken)
    done = cli("latents", "--sae", sae, "--rankings", tmp_path / "r", "-q", "-o", tmp_path / "p")
    assert "ranking" in done.error(1)


def test_rankings_and_reports_link_to_the_pages(
    cli: Cli, sae: Path, plan: Path, model: Path, task: Path, tmp_path: Path
) -> None:
    assert cli("latents", "--sae", sae, "--plan", plan, "--steer", 0, *SMALL, "-q",
               "-o", tmp_path / "pages").status == 0  # fmt: skip
    ranked = cli("rank", "--model", model, "--sae", sae, "--task", task, "--dtype", "float32",
                 "--by", "rate", "--read", "span", "--top", 3, "-q",
                 "-o", tmp_path / "ranked")  # fmt: skip
    assert f"pages of 3 of these latents: {tmp_path / 'pages/index.html'}" in ranked.out
    document = json.loads((tmp_path / "ranked/ranking.json").read_text())
    for row in document["latents"]:
        assert (tmp_path / "ranked" / row["page"]).is_file()
    done = cli("evaluate", "--model", model, "--plan", plan, "--task", task, "--n", 1,
               "--controls", "none", "--dtype", "float32", "-q",
               "-o", tmp_path / "report")  # fmt: skip
    assert done.status == 0, done.err
    html = (tmp_path / "report/report.html").read_text()
    for row in document["latents"]:
        assert f'<a href="../pages/latents/{row["id"]}.html">{row["id"]}</a>' in html
