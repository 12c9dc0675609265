"""The package gives its main names without paying for them at import."""

import subprocess
import sys

import pytest


def test_import_is_cheap() -> None:
    code = (
        "import sys, saesteer.checkpoints, saesteer.checkpoints.files, "
        "saesteer.checkpoints.run_state, saesteer.checkpoints.model_files, "
        "saesteer.checkpoints.provenance\n"
        "heavy = {'torch', 'transformers', 'sae_lens', 'huggingface_hub', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_found_when_used() -> None:
    import saesteer.checkpoints as checkpoints
    from saesteer.checkpoints import sae_file

    for name in ("SAE", "SAESpec", "load_sae", "save_sae"):
        assert getattr(checkpoints, name) is getattr(sae_file, name)
        assert name in dir(checkpoints)
    assert checkpoints.convert.__module__ == "saesteer.checkpoints.conversion"
    assert checkpoints.UserError.exit_status == 1
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = checkpoints.nothing
