"""Main objects show themselves in a line, and in a notebook as a small table."""

import torch

from saesteer.checkpoints import SAE, SAESpec
from saesteer.checkpoints.shown import Shown, rounded
from saesteer.steering import SteerReport, load_task

LONGEST = 400
"""Characters: a few lines of a notebook."""


def an_sae() -> SAE:
    return SAE(
        spec=SAESpec(d_model=64, d_sae=512, architecture="topk", k=8),
        W_enc=torch.zeros(64, 512),
        b_enc=torch.zeros(512),
        W_dec=torch.zeros(512, 64),
        b_dec=torch.zeros(64),
        source="<runs>/sae",
    )


def test_an_sae_shows_facts_and_no_weights() -> None:
    text = repr(an_sae())
    assert text.startswith("SAE(architecture=topk, d_model=64, d_sae=512, k=8,")
    assert "tensor" not in text and len(text) < LONGEST
    html = an_sae()._repr_html_()
    assert "&lt;runs&gt;/sae" in html and "<td" in html and "layer" not in html  # none is known


def test_tasks_and_reports_are_short() -> None:
    task = load_task("french")
    assert "name='french'" in repr(task) and task.contents["test"][0] not in repr(task)
    assert repr(SteerReport()) == "SteerReport(passes=0, rows=0, tokens_touched=0)"
    assert all(len(repr(thing)) < LONGEST for thing in (task, SteerReport()))


def test_what_is_not_known_is_left_out() -> None:
    class Thing(Shown):
        def _facts(self) -> dict[str, object]:
            return {"a": 0, "b": None, "c": "", "d": rounded(0.12345)}

    assert repr(Thing()) == "Thing(a=0, d=0.123)"
