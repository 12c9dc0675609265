"""Write a model whose circuit is known, find the circuit again, and test it.

python examples/circuit.py --out runs/hand
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from saesteer.mechanisms import (
    CircuitConfig,
    hand_built,
    load_pairs,
    read_groups,
    save_study,
    study_circuit,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/hand"))
    parser.add_argument("--scenes", type=int, default=40)
    args = parser.parse_args(argv)

    folder = hand_built(args.out, scenes=args.scenes)
    study = study_circuit(
        str(folder / "model"),
        load_pairs(folder / "scenes.jsonl"),
        read_groups(folder / "groups.yaml"),
        CircuitConfig(ablate="resample"),
    )
    print(study)
    for group in study.circuit.groups:
        print(f"{group.group.name} at {group.group.at}: heads {list(group.heads)}")
    save_study(folder, study)
    print(f"see {folder / 'report.html'}")


if __name__ == "__main__":
    main()
