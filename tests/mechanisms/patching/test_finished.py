"""A grid that was stopped goes on to the same figures; another grid's rows are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.config import PatchConfig
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching.finished import NAME, FinishedPairs
from saesteer.mechanisms.patching.grid import patch
from saesteer.sae.model.language_model import LanguageModel

CONFIG = PatchConfig(sites=("z",), at=("last", "object"))


def stopping(after: int) -> Callable[..., None]:
    """A progress that stops the grid, as Ctrl-C would."""

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "patching" and done == after:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("fast", [None, "ig"])
def test_a_stopped_grid_goes_on(
    toy: LanguageModel, scenes: list[Pair], tmp_path: Path, fast: str | None
) -> None:
    config = PatchConfig(sites=("z",), at=("last", "object"), fast=fast, verify=3, checks=3)
    whole = patch(toy, scenes, config)
    with pytest.raises(KeyboardInterrupt):
        patch(toy, scenes, config, finished=FinishedPairs(tmp_path), progress=stopping(5))
    seen: list[int] = []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "patching":
            seen.append(done)

    kept = FinishedPairs(tmp_path)
    again = patch(toy, scenes, config, finished=kept, resume=True, progress=progress)
    np.testing.assert_array_equal(again.effects, whole.effects)
    if fast:
        np.testing.assert_array_equal(again.fast, whole.fast)  # type: ignore[arg-type]
    assert seen[0] == 5 and seen[-1] == 12  # five pairs were not run again
    kept.remove()
    assert not (tmp_path / NAME).exists()


def test_a_cut_line_is_run_again(toy: LanguageModel, scenes: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        patch(toy, scenes, CONFIG, finished=FinishedPairs(tmp_path), progress=stopping(3))
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-7])  # the kill came in the middle of a line
    again = patch(toy, scenes, CONFIG, finished=FinishedPairs(tmp_path), resume=True)
    np.testing.assert_array_equal(again.effects, patch(toy, scenes, CONFIG).effects)


def test_another_grid_is_refused(toy: LanguageModel, scenes: list[Pair], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        patch(toy, scenes, CONFIG, finished=FinishedPairs(tmp_path), progress=stopping(2))

    def go_on(pairs: list[Pair] = scenes, config: PatchConfig = CONFIG) -> Any:
        return patch(toy, pairs, config, finished=FinishedPairs(tmp_path), resume=True)

    says = r"was begun with other settings: at \['last', 'object'\], now \['last'\]; give the same"
    with pytest.raises(UsageError, match=says):
        go_on(config=PatchConfig(sites=("z",)))
    with pytest.raises(UsageError, match="was begun with other pairs"):
        go_on(pairs=scenes[:11])
    # How long it may take does not change what it is.
    longer = PatchConfig(sites=("z",), at=("last", "object"), budget_minutes=30.0)
    assert go_on(config=longer).effects.shape == (12, 12)
    path = tmp_path / NAME
    path.write_text(path.read_text() + '{"stage": "exact"}\n')
    with pytest.raises(UserError, match="is no file of a grid"):
        go_on()
    path.unlink()
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="`resume` .* holds a whole result: give `force`"):
        go_on()
