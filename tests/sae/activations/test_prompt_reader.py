"""Prompts are read as if alone, and judged as contexts that come one after the other."""

from collections.abc import Callable, Sequence

import pytest
import torch

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.sae.activations.prompt_reader import PromptReader, PromptRows
from saesteer.sae.model.hooks import HookPoint, resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel

Shared = Callable[..., LanguageModel]

SINK = 7
PROMPTS = [[40, 41], [50, 51, 52, 53, 54], [SINK], [60, 61, SINK, 62], [1, 70, 71, 72]]


@pytest.fixture
def lm(fresh_lm: Shared) -> LanguageModel:
    """A model for which one token is an attention sink wherever it stands."""
    lm = fresh_lm()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[SINK] *= 300
    return lm


def points_of(lm: LanguageModel) -> list[HookPoint]:
    return [resolve_site(lm, 2), resolve_site(lm, 1, "mlp_out")]


def read(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], batch_size: int = 16
) -> dict[int, PromptRows]:
    reader = PromptReader(lm, points_of(lm)[:1], batch_size=batch_size)
    return {prompt.number: prompt for prompt in reader.read(prompts)}


def test_rows_are_those_of_single_prompts(lm: LanguageModel) -> None:
    points, counted = points_of(lm), []
    reader = PromptReader(lm, points, batch_size=2)
    order = []
    for prompt in reader.read(PROMPTS, counted.append):
        order.append(prompt.number)
        ids = torch.tensor([PROMPTS[prompt.number]])
        with torch.inference_mode():
            alone = run_to(lm, points, input_ids=ids)
        assert list(prompt.rows) == [point.key for point in points]
        for place, rows in prompt.rows.items():
            # A padded batch is summed in another order.
            torch.testing.assert_close(rows, alone[place][0], rtol=1e-4, atol=1e-4)
    assert order == [1, 3, 4, 0, 2], "the longest first, equal ones as they came"
    assert counted == [2, 2, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_sinks_are_told_whatever_the_batch_size(lm: LanguageModel, batch_size: int) -> None:
    for number, prompt in read(lm, PROMPTS, batch_size).items():
        assert prompt.keep.tolist() == [token != SINK for token in PROMPTS[number]]


def test_the_first_token_says_nothing_about_usual_lengths(lm: LanguageModel) -> None:
    """Else the sink at the start of a short prompt would be its median, and raise all limits."""
    found = read(lm, [[SINK, 40], [SINK, 41], [SINK]])
    assert [found[i].keep.tolist() for i in range(3)] == [[False, True], [False, True], [False]]


def test_special_tokens_are_judged_and_not_counted(lm: LanguageModel) -> None:
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[1] *= 300
    assert 1 in lm.special_ids.tolist()
    found = read(lm, [[40, 1, 1, 1, 41]])
    assert found[0].keep.tolist() == [True, False, False, False, True]


def test_nothing_is_left_out_where_nothing_is_known(lm: LanguageModel) -> None:
    assert all(prompt.keep.all() for prompt in read(lm, [[SINK], [40]]).values())


def test_what_one_reader_reads_is_one_sequence(lm: LanguageModel) -> None:
    reader = PromptReader(lm, points_of(lm)[:1])
    list(reader.read([[40, 41, 42]]))
    assert [prompt.keep.tolist() for prompt in reader.read([[SINK]])] == [[False]]


def test_activations_that_are_not_finite(lm: LanguageModel) -> None:
    resolve_site(lm, 1, "mlp_out")  # by a pass of its own, over tokens of its own
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[40] = torch.nan
    with pytest.raises(NonFiniteError, match="tiny-llama gave NaN or infinite .* at layer 2"):
        read(lm, PROMPTS)
