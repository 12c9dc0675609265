"""`saesteer train --dry-run`: what a training would need."""

from argparse import Namespace

from saesteer.cli.inputs import open_model
from saesteer.cli.output import amount, print_json, size
from saesteer.cli.progress import reporting
from saesteer.sae.config import TrainConfig


def show_plan(args: Namespace, config: TrainConfig) -> int:
    """Check the settings and print memory, bytes and predicted times; writes nothing."""
    from saesteer.sae.runs.processes import is_first

    first = is_first()
    args.quiet = args.quiet or not first
    with reporting(args) as report:
        from saesteer.sae.verbs.predict_training import predict_training

        model = None
        if args.activations is None:
            model = open_model(args, report, dtype=args.lm_dtype or "auto")
        plan = predict_training(
            config, model=model, activations=args.activations, device=args.device, progress=report
        )
    if not first:
        return 0
    if args.json:
        print_json(plan)
        return 0
    mesh, count = plan["mesh"], plan["processes"]
    each = "" if count == 1 else " for each process"
    print(
        f"would train {len(plan['saes'])} SAE{'s' if len(plan['saes']) > 1 else ''} for "
        f"{amount(plan['steps'])} steps of {amount(plan['batch_tokens'])} tokens on "
        f"{count} process{'es' if count > 1 else ''} ({mesh['data']} x {mesh['latent_shards']} "
        "latent shards)"
    )
    print(f"  buffer    {size(plan['buffer_bytes'])}{each}")
    if count > 1:
        print(f"  rows      {size(plan['rows_sent_bytes_per_step'])} sent a step{each}")
    for sae in plan["saes"]:
        print(f"  {sae['sae']}")
        print(f"    memory  {size(sae['memory_bytes'])}{each}")
        if count > 1:
            print(f"    sent    {size(sae['sent_bytes_per_step'])} a step{each}")
        seconds = sae["predicted_h100_seconds_per_step"]
        print(
            f"    a step  {1000 * seconds['nvlink']:.3g} ms on H100s with NVLink, "
            f"{1000 * seconds['400_gbit']:.3g} ms over 400 Gb/s (predicted, not measured)"
        )
    return 0
