"""What `train` returns: the SAE, its log as table and chart, and the record that it was before."""

from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.files import read_json
from saesteer.sae import SyntheticConfig, TrainConfig, synthesise, train
from saesteer.sae.training.result import Trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder: Path = tmp_path_factory.mktemp("result")
    synthesise(folder / "acts", SyntheticConfig(d_model=8, features=1400), tokens=4096)
    config = TrainConfig(d_sae=(16,), k=(2,), tokens=4096, batch_tokens=512)
    (one,) = train(folder / "sae", config, activations=folder / "acts")
    return one


def test_it_is_the_record_and_the_sae(trained: Trained) -> None:
    assert {**trained, "folder": None} == {**read_json(trained.folder / "run.json"), "folder": None}
    assert trained.sae is trained.sae  # opened once
    assert trained.sae.sha256 == trained["sae"]["sha256"]
    assert trained.sae.encode(torch.randn(3, 8)).shape == (3, 16)
    assert repr(trained).startswith("Trained(folder=") and len(repr(trained)) < 300
    assert "<table>" in trained._repr_html_()


def test_its_log_is_a_table_and_a_chart(trained: Trained) -> None:
    frame = trained.to_frame()
    assert frame.index.name == "step" and list(frame["fvu"]) == [row["fvu"] for row in trained.log]
    chart = trained.plot("l0")
    assert chart.title == "l0 by tokens" and chart.svg.count("<polyline") == 1
    with pytest.raises(UsageError, match="`quantity` must be one of .*fvu.*, got 'loss'"):
        trained.plot("loss")


@pytest.mark.parametrize("shape", [(7,), (3, 9)])
def test_a_wrong_width_is_named(trained: Trained, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"`x` must end in an axis of 8 \(d_model .*, got the shape"
    ):
        trained.sae.encode(torch.randn(shape))
    with pytest.raises(ValueError, match=r"`latent_acts` must end in an axis of 16 \(d_sae"):
        trained.sae.decode(torch.randn(shape))
