"""Blocks that run compiled for as long as a pass takes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.sae import harvest
from saesteer.sae.activations.reader import open_activations
from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.model.compiled_blocks import CompiledBlocks
from saesteer.sae.model.hooks import resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel

Shared = Callable[..., LanguageModel]
IDS = (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 3, 3, 1]]))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as `torch.compile` does and run what was traced as it is: no compiler is needed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.parametrize(
    "sites",
    [["resid_post"], ["resid_pre"], ["mlp_out"], ["resid_mid", "resid_post"],
     ["model.layers.{layer}.self_attn"]],
)  # fmt: skip
@pytest.mark.usefixtures("traced")
def test_every_pass_reads_its_own_rows(fresh_lm: Shared, sites: list[str]) -> None:
    lm = fresh_lm("llama")
    points = [resolve_site(lm, 1, site) for site in sites]
    expected = [run_to(lm, points, input_ids=ids) for ids in IDS]
    blocks = CompiledBlocks(lm, points)
    for ids, rows in zip(IDS, expected, strict=True):
        with torch.inference_mode(), blocks:
            seen = run_to(lm, points, input_ids=ids)
        assert seen.keys() == rows.keys()
        for key in rows:
            torch.testing.assert_close(seen[key], rows[key])


@pytest.mark.usefixtures("traced")
def test_only_whole_blocks_up_to_the_last_point_are_compiled(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    points = [resolve_site(lm, 0), resolve_site(lm, 1, "mlp_out"), resolve_site(lm, 2)]

    def compiled() -> list[int]:
        return [i for i, block in enumerate(lm.blocks) if "forward" in vars(block)]

    with CompiledBlocks(lm, points):
        assert compiled() == [0, 2]
    assert compiled() == []


@pytest.mark.usefixtures("traced")
def test_the_forward_that_was_there_comes_back(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    own = lm.blocks[0].forward = functools.partial(type(lm.blocks[0]).forward, lm.blocks[0])
    with pytest.raises(RuntimeError, match="inside"), CompiledBlocks(lm, [resolve_site(lm, 1)]):
        assert lm.blocks[0].forward is not own
        raise RuntimeError("inside")
    assert lm.blocks[0].forward is own
    assert "forward" not in vars(lm.blocks[1])


@pytest.mark.usefixtures("traced")
def test_a_harvest_knows_whether_it_was_compiled(fresh_lm: Shared, tmp_path: Path) -> None:
    stages: list[str] = []
    text = TextConfig(context=24, batch_size=4, compile=True)
    config = HarvestConfig(layers=(1,), tokens=200, text=text, shard_tokens=64)
    manifest = harvest(
        fresh_lm("llama"), tmp_path / "acts", config,
        progress=lambda stage, done, total, note: stages.append(stage),
    )  # fmt: skip
    assert manifest["config"]["compile"] is True
    assert stages[:2] == ["compile", "compile"] and stages[-1] == "harvest"
    plain = HarvestConfig(layers=(1,), tokens=200, text=TextConfig(context=24, batch_size=4),
                          shard_tokens=64)  # fmt: skip
    with pytest.raises(UserError, match="`compile` True, now it is False"):
        harvest(fresh_lm("llama"), tmp_path / "acts", plain, resume=True)


def test_a_machine_without_a_compiler_says_so(shared_lm: Shared, tmp_path: Path) -> None:
    from torch._inductor import config

    lm, text = shared_lm("llama"), TextConfig(context=24, batch_size=4, compile=True)
    lacking = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    torch.compiler.reset()
    with (
        config.patch(lacking),
        pytest.raises(UserError, match=r"`compile` does not work here .* leave it out") as raised,
    ):
        open_activations(lm, [resolve_site(lm, 1)], text, replies_folder=tmp_path)
    said = str(raised.value)
    assert "\n" not in said and "No working C++ compiler" in said
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
def test_compiled_code_reads_the_same(fresh_lm: Shared, tmp_path: Path, isolated: bool) -> None:
    lm = fresh_lm("llama")
    points = [resolve_site(lm, 1), resolve_site(lm, 2)]

    def read(compiled: bool) -> Any:
        text = TextConfig(context=24, batch_size=4, compile=compiled, isolate_documents=isolated)
        stream = open_activations(lm, points, text, replies_folder=tmp_path)
        return [stream.next_batch() for _ in range(3)]

    for seen, expected in zip(read(True), read(False), strict=True):
        assert torch.equal(seen.token_ids, expected.token_ids)
        for key, rows in expected.activations.items():
            torch.testing.assert_close(seen.activations[key], rows, rtol=1e-4, atol=1e-5)
