"""The report of what was touched: norms and doses of each position."""

import numpy as np
import pytest
import torch

from saesteer.sae.model.hooks import capture, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.hook import steer

from ..hook_reference import edited_at, generate, prompts_of, ranked_plan
from ..whole_row import CLOSE, LAYER, STEPS, make_sae

pytestmark = pytest.mark.usefixtures("endless")


@pytest.mark.parametrize("cached", [True, False])
def test_the_report_gives_norms_and_doses_of_each_position(cached: bool, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm)
    delta = sum(d * sae.W_dec[j] for j, d in zip(plan.ids, plan.doses(), strict=True)).norm()
    with steer(lm, plan) as report:
        tokens, _ = generate(lm, prompts, use_cache=cached)
        first = report.tokens_touched
        generate(lm, prompts, use_cache=cached)
    assert first == 3 * STEPS
    assert report.tokens_touched == 2 * first
    here = resolve_site(lm, LAYER)
    ratios = []
    for i, (prompt, new) in enumerate(zip(prompts, tokens.tolist(), strict=True)):
        row = torch.tensor([[*prompt.token_ids, *new[:-1]]])
        with torch.no_grad(), capture([here]) as seen:
            # The steered layer's own edit is the only thing below it that changes: nothing.
            with edited_at(lm, LAYER, lambda h: h, []):
                lm.model(input_ids=row)
        norms = seen[here.key][0, len(prompt) - 1 :].norm(dim=-1)
        found = report.call_rows(0)[i]
        torch.testing.assert_close(found.residual_norms[:1], norms[:1], **CLOSE)
        torch.testing.assert_close(
            found.delta_norms, delta.expand(len(found.positions)), rtol=1e-5, atol=0.0
        )
        ratios.append(found.relative_doses)
        short = found.before(len(prompt) + 2)
        assert short.positions.tolist() == [len(prompt) - 1, len(prompt), len(prompt) + 1]
        assert torch.equal(short.relative_doses, found.relative_doses[:3])
    assert report.relative_dose == pytest.approx(float(np.median(torch.cat(ratios).numpy())))
    assert report.delta_norm == pytest.approx(float(delta), rel=1e-5)
    assert report.passes == 2 * STEPS


def test_the_report_as_a_table_and_a_chart(lm: LanguageModel) -> None:
    plan, prompts = ranked_plan(lm, make_sae(lm)), prompts_of(lm)
    with steer(lm, plan, prompts=prompts) as report:
        generate(lm, prompts)
    frame = report.to_frame()
    assert len(frame) == report.tokens_touched
    assert frame["relative_dose"].median() == pytest.approx(report.relative_dose)
    assert list(frame.loc[frame["row"] == 0, "position"]) == report.rows[0].positions.tolist()
    lengths = [row.prompt_length for row in report.rows]
    assert all(
        p >= lengths[r] for p, r in frame.loc[frame["generated"], ["position", "row"]].values
    )
    assert report.plot().svg.count("<polyline") == len(report.rows)
