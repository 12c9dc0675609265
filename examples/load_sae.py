"""Open an SAE and look at one text through it.

    python examples/load_sae.py --sae runs/example/sae -p "The bridge is closed on Monday."

`--sae` takes a folder in SAELens format, or RELEASE:ID for the pretrained SAEs that SAELens lists:

    --model google/gemma-2-2b --sae gemma-scope-2b-pt-res-canonical:layer_25/width_16k/canonical
"""

import argparse
from collections.abc import Sequence

import torch

from saesteer.checkpoints import load_sae
from saesteer.sae import load_model
from saesteer.sae.model.hooks import run_to, sae_hook_point
from saesteer.steering import lens_tokens


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sae", default="runs/example/sae", help="folder or RELEASE:ID")
    parser.add_argument("-p", "--prompt", default="The bridge is closed on Monday.")
    parser.add_argument("--top", type=int, default=3, help="latents to show per token")
    args = parser.parse_args(argv)

    lm = load_model(args.model)
    sae = load_sae(args.sae, device=lm.device)
    spec = sae.spec
    print(f"{spec.architecture}, {spec.d_sae} latents, reads {spec.hook_name} of {spec.model_name}")

    # The residuals at the place that this SAE reads.
    point = sae_hook_point(sae, lm)
    ids = lm.tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(lm.device)
    with torch.inference_mode():
        x = run_to(lm, [point], input_ids=ids)[point.key][0]  # [tokens, d_model]
        latents = sae.encode(x)  # [tokens, d_sae], mostly zeros
        error = (x - sae.decode(latents)).norm(dim=1) / x.norm(dim=1)

    # The first position is an attention sink in most models: its residual is far longer than the
    # others, training left it out, and what the SAE says of it means nothing.
    for token, acts, missed in zip(ids[0].tolist(), latents, error.tolist(), strict=True):
        best = acts.topk(args.top)
        # A latent's direction, read through the unembedding, names the tokens that it promotes.
        named = [
            f"{i} {value:.2f} {lens_tokens(lm, sae.W_dec[i], 3)}"
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if value > 0
        ]
        print(f"{lm.tokenizer.decode([token])!r:12} error {missed:.2f}  {'; '.join(named)}")


if __name__ == "__main__":
    main()
