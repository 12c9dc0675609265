"""Check that hooks read and write at the right place in a model, and predict what a job costs.

python examples/doctor.py --model smollm2-135m-instruct --layer 20
"""

import argparse
from collections.abc import Sequence

from saesteer.sae import doctor


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layer", type=int, help="default: the SAE's own, or the middle")
    parser.add_argument("--sae", help="an SAE to try on the model: folder or RELEASE:ID")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="size of the job")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)

    found = doctor(
        args.model,
        layer=args.layer,
        sae=args.sae,
        tokens=args.tokens,
        context=args.context,
        batch_size=args.batch_size,
    )
    print(f"{found['model']['name']}: {found['module']}")
    for check in found["checks"]:
        print(f"{'ok  ' if check['ok'] else 'FAIL'} {check['name']}: {check['detail']}")
    for name, value in found["predictions"].items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
