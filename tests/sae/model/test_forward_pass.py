"""A pass that is begun now and asked for later."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import TextConfig
from saesteer.sae.model.forward_pass import ForwardPass, document_positions, model_inputs
from saesteer.sae.model.hooks import HookPoint, resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.contexts import ContextBatch, open_contexts

Shared = Callable[..., LanguageModel]


def contexts_of(lm: LanguageModel) -> ContextBatch:
    batch = open_contexts(lm, TextConfig(context=24, batch_size=4)).next_batch(4)
    assert batch is not None
    return batch


def begin(
    lm: LanguageModel, points: list[HookPoint], contexts: ContextBatch, isolated: bool = False
) -> ForwardPass:
    return ForwardPass.begin(lm, points, model_inputs(lm, contexts, isolated))


def test_document_positions() -> None:
    owners = torch.tensor([[-1, 7, 7, 8, 8, 9], [3, 3, 3, 3, 3, 3], [-1, -2, -2, -3, 4, 4]])
    assert document_positions(owners).tolist() == [
        [0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 1]
    ]  # fmt: skip


def test_norms_and_rows_are_those_of_the_pass(shared_lm: Shared) -> None:
    lm = shared_lm()
    points, contexts = [resolve_site(lm, 2), resolve_site(lm, 0, "resid_mid")], contexts_of(lm)
    where = torch.tensor([0, 5, 23, 24, 95])
    with torch.inference_mode():
        forward = begin(lm, points, contexts)
        seen = run_to(lm, points, input_ids=contexts.token_ids)
        lengths = torch.stack([seen[point.key].norm(dim=-1) for point in points])
        torch.testing.assert_close(forward.norms(), lengths)
        rows = forward.rows(where)
        assert list(rows) == [point.key for point in points]
        for point in points:
            assert torch.equal(rows[point.key], seen[point.key].flatten(0, 1)[where])


def test_a_process_without_contexts_has_no_rows(shared_lm: Shared) -> None:
    lm = shared_lm()
    points, whole = [resolve_site(lm, 1)], contexts_of(lm)
    none = replace(whole, **{name: value[:0] for name, value in vars(whole).items()})
    forward = begin(lm, points, none, isolated=True)
    assert forward.norms().shape == (1, 0, 24)
    rows = forward.rows(torch.empty(0, dtype=torch.long))[1, "resid_post"]
    assert rows.shape == (0, lm.d_model) and rows.dtype == lm.dtype


def test_another_width_is_refused(shared_lm: Shared) -> None:
    lm = shared_lm()
    point = resolve_site(lm, 1, "model.layers.{layer}.mlp.up_proj")
    with pytest.raises(UsageError, match=r"up_proj has width \d+, the residual stream of"):
        begin(lm, [point], contexts_of(lm))


@pytest.mark.gpu
def test_a_gpu_gives_the_rows_of_the_cpu(fresh_lm: Shared) -> None:
    """Two passes are under way when the rows of the first are asked for."""
    lm = fresh_lm()
    points, contexts = [resolve_site(lm, 2), resolve_site(lm, 1)], contexts_of(lm)
    turned = replace(contexts, token_ids=contexts.token_ids.flip(0))
    where = torch.arange(0, 96, 3)
    with torch.inference_mode():
        expected = begin(lm, points, contexts)
        lm.model.to("cuda")
        passes = [begin(lm, points, given) for given in (contexts, turned)]
        places = [where, (3 - where // 24) * 24 + where % 24]
        for forward, there in zip(passes, places, strict=True):
            norms, rows = forward.norms(), forward.rows(there)
            assert norms.device.type == "cpu"
            at_there = norms.flatten(1)[:, there]
            here = expected.norms().flatten(1)[:, where]
            torch.testing.assert_close(at_there, here, rtol=1e-3, atol=1e-3)
            for key, values in expected.rows(where).items():
                assert rows[key].device.type == "cpu"
                torch.testing.assert_close(rows[key], values, rtol=1e-3, atol=1e-3)
