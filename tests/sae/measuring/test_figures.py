"""Figures equal those of SAELens for the same SAE and tokens, where the definitions agree."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.sae_file import SAE, SAESpec, save_sae
from saesteer.sae.config import MetricsConfig, TextConfig
from saesteer.sae.measuring.figures import figures_of_rows, figures_of_runs, row_values
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.contexts import open_contexts
from saesteer.sae.verbs.metrics import metrics

Shared = Callable[..., LanguageModel]
LAYER = 1
HOOK = f"blocks.{LAYER}.hook_resid_post"


def one_document(folder: Path) -> TextConfig:
    """Text in which every position counts for both: no BOS, no separators, no sinks, one batch."""
    path = folder / "text.txt"
    path.write_text(" ".join(f"on day {n} the heron counts {n * n % 97} fish" for n in range(60)))
    return TextConfig(data=(str(path),), context=24, batch_size=12, bos="never", max_norm_ratio=1e9)


def sums_of(values: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.double().sum()[None].numpy() for name, value in values.items()}


def some_sae(lm: LanguageModel) -> SAE:
    rng = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(80, lm.d_model, generator=rng), dim=1)
    spec = SAESpec(
        architecture="topk", d_model=lm.d_model, d_sae=80, k=12, hook_name=HOOK, model_name=lm.name
    )
    return SAE(spec, rows.T.contiguous(), torch.zeros(80), rows, 0.1 * torch.ones(lm.d_model))


class AsSAELensRunsIt:
    """The model with the calls that SAELens' evaluation makes, cut to positions with a next one."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def run_with_cache(self, tokens: torch.Tensor, **options: Any) -> tuple[None, dict[str, Any]]:
        states = self.lm.model(input_ids=tokens, output_hidden_states=True).hidden_states
        return None, {HOOK: states[LAYER + 1][:, :-1]}

    def run_with_hooks(
        self, tokens: torch.Tensor, fwd_hooks: Any = (), **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        handles = [
            self.lm.blocks[LAYER].register_forward_hook(
                lambda module, args, out, edit=edit: edit(out, hook=None)
            )
            for _, edit in fwd_hooks
        ]
        try:
            logits = self.lm.model(input_ids=tokens).logits[:, :-1]
        finally:
            for handle in handles:
                handle.remove()
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return logits, nats.view(len(tokens), -1)

    __call__ = run_with_hooks


@torch.no_grad()
def test_figures_equal_saelens(shared_lm: Shared, tmp_path: Path) -> None:
    evals = pytest.importorskip("sae_lens.evals")
    from sae_lens import SAE as SAELensSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    lm = shared_lm()
    text = one_document(tmp_path)
    batch = open_contexts(lm, text).next_batch(text.batch_size)
    assert batch is not None and bool(batch.keep.all())
    sae = some_sae(lm)
    save_sae(tmp_path / "sae", sae.spec, **sae.tensors())
    theirs = SAELensSAE.load_from_disk(tmp_path / "sae")
    model = AsSAELensRunsIt(lm)
    store = SimpleNamespace(get_batch_tokens=lambda prompts: batch.token_ids)
    no_mask = SimpleNamespace(get_batch_tokens=lambda prompts: batch.token_ids[:, :-1])

    class Once(AsSAELensRunsIt):
        """Its mask has the form of the tokens, so the tokens here have no last position."""

        def run_with_cache(self, tokens: torch.Tensor, **options: Any) -> Any:
            return super().run_with_cache(batch.token_ids)

    scalars, of_latents = evals.get_sparsity_and_variance_metrics(
        theirs, Once(lm), no_mask, ActivationScaler(), n_batches=1, compute_l2_norms=True,
        compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, eval_batch_size_prompts=1, model_kwargs={},
    )  # fmt: skip
    runs = evals.get_recons_loss(
        theirs, model, ActivationScaler(), store.get_batch_tokens(1), compute_kl=True,
        compute_ce_loss=True, hook_name=HOOK,
    )  # fmt: skip
    ours = metrics(sae, lm, MetricsConfig(tokens=200, text=text, bootstrap=2))
    assert ours["tokens"] == batch.token_ids[:, 1:].numel()
    expected = {
        "l0": scalars["l0"],
        "cosine": scalars["cossim"],
        "relative_norm": scalars["l2_ratio"],
        "shrinkage": 1 / scalars["relative_reconstruction_bias"],
        "ce_plain": runs["ce_loss_without_sae"].mean(),
        # Its ablations and reconstructions replace the last position, too; nothing is read there.
        "ce_spliced": runs["ce_loss_with_sae"].mean(),
        "ce_zero": runs["ce_loss_with_ablation"].mean(),
        "kl": runs["kl_div_with_sae"].mean(),
    }
    for name, value in expected.items():
        assert ours[name]["value"] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    # The mean is over all kept rows here, and over those that are counted there.
    assert ours["fvu"]["value"] == pytest.approx(1 - scalars["explained_variance"], rel=3e-3)
    assert ours["ev_legacy"]["value"] == pytest.approx(
        scalars["explained_variance_legacy"], abs=3e-3
    )
    density = np.asarray(of_latents["feature_density"])
    assert ours["dead_latents"] == int((density == 0).sum())
    assert ours["dense_latents"]["above_0.1"] == int((density > 0.1).sum())
    # On exactly the same rows both agree to float32.
    x = model.run_with_cache(batch.token_ids)[1][HOOK].flatten(0, 1)
    latents = sae.encode(x)
    values = row_values(x, sae.decode(latents), latents, x.mean(dim=0))
    found = figures_of_rows(sums_of(values))
    assert found["fvu"][0] == pytest.approx(1 - scalars["explained_variance"], rel=1e-5)
    assert found["ev_legacy"][0] == pytest.approx(scalars["explained_variance_legacy"], rel=1e-5)
    assert 0.01 < found["fvu"][0] < 2, "not a trivial case"


def test_explained_variances_that_are_not_one_minus_fvu() -> None:
    """A mean far from 0 flatters the one, long rows hide in the other."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(500, 8, generator=rng, dtype=torch.float64) + 10
    nothing = x.mean(dim=0).expand_as(x)
    values = row_values(x, nothing, torch.zeros(500, 4, dtype=torch.float64), x.mean(dim=0))
    found = figures_of_rows(sums_of(values))
    assert found["fvu"][0] == pytest.approx(1.0)
    assert found["ev_legacy"][0] == pytest.approx(0.0)
    assert found["ev_about_zero"][0] > 0.98
    x[:5] *= 100  # reconstructed perfectly, while the rest is reconstructed as 0
    some = torch.where(torch.arange(500)[:, None] < 5, x, 0.0)
    values = row_values(x, some, torch.zeros(500, 4, dtype=torch.float64), x.mean(dim=0))
    found = figures_of_rows(sums_of(values))
    assert found["fvu"][0] < 0.02 < 0.9 < found["token_error"][0]


def test_shrinkage_is_the_best_factor() -> None:
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(60, 5, generator=rng)
    out = 0.7 * x + 0.1 * torch.randn(60, 5, generator=rng)
    values = row_values(x, out, torch.zeros(60, 1), x.mean(dim=0))
    found = figures_of_rows(sums_of(values))
    factors = torch.linspace(1, 2, 10_001)
    errors = [float((x - c * out).square().sum()) for c in factors]
    assert found["shrinkage"][0] == pytest.approx(float(factors[int(np.argmin(errors))]), abs=1e-4)


def test_rows_of_zeros_and_no_gap_to_recover() -> None:
    zeros = torch.zeros(3, 4)
    values = row_values(zeros, zeros, torch.zeros(3, 2), torch.zeros(4))
    found = figures_of_rows(sums_of(values))
    assert found["fvu"][0] == found["cosine"][0] == found["token_error"][0] == 0.0
    assert np.isnan(found["shrinkage"][0])
    runs = {name: np.array([7.0]) for name in ("ce_plain", "ce_spliced", "ce_ablated", "ce_zero")}
    found = figures_of_runs({**runs, "kl": np.array([0.0]), "rows": np.array([5.0])})
    assert np.isnan(found["ce_recovered"][0]) and np.isnan(found["ce_recovered_zero"][0])
    assert found["ce_increase"][0] == 0.0
