"""The instructed model's log-probability, against token by token in single rows."""

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.grades.instructed import instructed_scores
from saesteer.steering.tasks.task import compose, load_task

CONTENTS = ("A thin crust of salt formed.", "Rain closed the road.", "It is late.")
REPLIES = ("Une croûte de sel.", "La pluie a fermé la route, hélas.", "")


def slowly(lm: LanguageModel, prompt: str, row: list[int]) -> float:
    """The mean log-probability of a reply's tokens, each from a pass of its own, in float64."""
    ids = list(encode_prompt(lm, prompt, chat=lm.has_chat_template).token_ids)
    total = 0.0
    for token in row:
        with torch.inference_mode():
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, dim=-1)[token])
        ids.append(token)
    return total / len(row)


@pytest.mark.parametrize("placement", ["post", "pre"])
def test_scores_are_those_of_single_tokens(lm: LanguageModel, placement: str) -> None:
    task = load_task("french")
    found = instructed_scores(lm, task, CONTENTS, REPLIES, placement=placement)
    wording = task.evaluate_variants[0].text
    for content, reply, score in zip(CONTENTS, REPLIES, found, strict=True):
        row = lm.tokenizer(reply, add_special_tokens=False).input_ids
        if not row:
            assert (score.instructed, score.plain, score.gain) == (None, None, None)
            continue
        asked = compose(content, wording, placement)  # type: ignore[arg-type]
        # float32, other shapes of the same products
        assert score.instructed == pytest.approx(slowly(lm, asked, row), rel=1e-4)
        assert score.plain == pytest.approx(slowly(lm, content, row), rel=1e-4)
        assert score.gain == score.instructed - score.plain  # type: ignore[operator]


def test_token_ids_and_a_wording_of_ones_own(lm: LanguageModel) -> None:
    task = load_task("french")
    rows = [[5, 9, 11], [300]]
    found = instructed_scores(lm, task, CONTENTS[:2], rows, wording="In French, please.")
    for content, row, score in zip(CONTENTS, rows, found, strict=False):
        asked = compose(content, "In French, please.")
        assert score.instructed == pytest.approx(slowly(lm, asked, row), rel=1e-4)


def test_what_is_refused(lm: LanguageModel) -> None:
    task = load_task("french")
    with pytest.raises(UsageError, match="`replies` has 1 entries for 2 contents"):
        instructed_scores(lm, task, CONTENTS[:2], ["a"])
    with pytest.raises(UsageError, match="`placement` must be post or pre"):
        instructed_scores(lm, task, CONTENTS[:1], ["a"], placement="mid")
