"""The flags of `saesteer steer`: what steers, how, and what is generated."""

import argparse

from saesteer.cli.flags import SITE_HELP, add_common, add_model, add_reply_sampling, default
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.values import budget, count, latents, number, one_layer
from saesteer.steering.ranking.config import RankConfig


def add_flags(parser: VerbParser) -> None:
    """The flags of `steer`."""
    what = parser.add_argument_group("what steers: --plan, or --sae with --latents")
    add_model(what, "(default: the one the plan or the SAE names)")
    what.add_argument("--plan", metavar="FILE", help="a plan.yaml, or the folder that holds it")
    what.add_argument(
        "--also",
        action=Repeated,
        metavar="FILE",
        help="another plan, applied after the ones before it; repeatable",
    )
    what.add_argument(
        "--beside",
        action=Repeated,
        metavar="WAY",
        help="answer in another way as well, for comparison: the path of a plan, meandiff (steer "
        "with the mean difference of the plan's task, at the same length), prompt (the plan's "
        "instruction in the prompt, unsteered) or prompt:TEXT; repeatable",
    )
    what.add_argument(
        "--sae",
        metavar="DIR",
        help="folder or file of an SAE, or RELEASE:ID of sae_lens; with --plan: where the plan's "
        "SAE is now, for methods that read latents",
    )
    what.add_argument(
        "--latents",
        type=latents,
        metavar="ID:V,...",
        help="latents by number and their values, such as 9143:1.2,412:0.8; method add adds "
        "V * W_dec[ID] (ablate and project take ids without values)",
    )
    what.add_argument(
        "--layer",
        type=one_layer,
        metavar="L",
        help="with --latents: the block that the SAE reads (default: the SAE's own)",
    )
    what.add_argument(
        "--site", metavar="SITE", help=f"with --latents: {SITE_HELP} (default: the SAE's own)"
    )
    how = parser.add_argument_group("how; with --plan the defaults are the plan's")
    how.add_argument(
        "--method",
        metavar="NAME",
        help="add, add-keep-norm, set, min, max, scale, ablate or project (default with --latents: "
        "add)",
    )
    how.add_argument(
        "--unit",
        metavar="NAME",
        help="unit of the doses: raw, sigma, max or rel (default with --latents: raw)",
    )
    how.add_argument(
        "--scale",
        type=number,
        metavar="X",
        help="multiplies every dose (default with --latents: 1)",
    )
    how.add_argument(
        "--dose",
        type=budget,
        metavar="KIND=X",
        help="find the scale that costs X nats per token on neutral questions: ce=0.1 (rise of the "
        "cross-entropy) or kl=0.1 (KL divergence); with --out, the plan at that scale is written "
        "to its sub-folder plan (default: the scale of the plan)",
    )
    how.add_argument(
        "--dose-on",
        metavar="FILE",
        help="with --dose: prompts to measure on, as for --prompts (default: neutral questions)",
    )
    how.add_argument(
        "--beta",
        type=number,
        metavar="X",
        help="with --plan: dose mu + beta * sigma (default: the plan's)",
    )
    how.add_argument(
        "--scope",
        metavar="WHERE",
        help="positions to steer: generation, generated, prompt, all, last-prompt, first:N, "
        "span:A-B, after-instruction, assistant, tail (the template after the user's text) or "
        "replies (default with --latents: generation)",
    )
    how.add_argument(
        "--schedule",
        metavar="HOW",
        help="strength over the new tokens: constant, first:N, linear:N, decay:OMEGA,K or "
        "steps:G=W,G=W,... "
        "(default with --latents: constant)",
    )
    how.add_argument(
        "--gate",
        metavar="IF",
        help="edit only where a condition on latents holds: '412 > 3 & !(77 > 1)', '412 > 3 : 1' "
        "(on above 3, off again at 1), 'prompt: 412 > 3' (decided once, on the prompt)",
    )
    how.add_argument(
        "--exclude-special",
        action="store_true",
        help="never steer special tokens, whatever the scope",
    )
    how.add_argument(
        "--include-first",
        action="store_true",
        help="with scope prompt or all: steer position 0 too",
    )
    how.add_argument(
        "--include-template",
        action="store_true",
        help="with scope prompt, all or assistant: steer template and special tokens too",
    )
    text = parser.add_argument_group("prompts")
    text.add_argument(
        "-p", "--prompt", action=Repeated, metavar="TEXT", help="a prompt; repeatable"
    )
    text.add_argument(
        "--prompts",
        metavar="FILE",
        help="file of prompts: .jsonl with `prompt`, .txt with one per line, or - for stdin",
    )
    text.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="send prompts through the chat template (default: when there is one)",
    )
    work = parser.add_argument_group("generation")
    work.add_argument(
        "--max-new-tokens", type=count, default=64, metavar="N", help="longest reply (default: 64)"
    )
    work.add_argument(
        "--temperature",
        type=number,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: 0)",
    )
    work.add_argument(
        "--top-p",
        type=number,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens of total probability P (default: 1)",
    )
    work.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="prompts per batch (default: 16)"
    )
    work.add_argument(
        "--baseline",
        action="store_true",
        help="also generate the unsteered text; without a plan, generate only that",
    )
    work.add_argument(
        "--explain",
        action="store_true",
        help="print a table of the plan's latents: the change asked for and the change measured",
    )
    add_reply_sampling(
        parser.add_argument_group("with --beside meandiff: the replies that it is read on"),
        RankConfig,
        f"contents that are answered {default(RankConfig, 'contents')}",
        tokens="max_new_tokens",
        temperature="temperature",
        top_p="top_p",
    )
    add_common(
        parser,
        out="folder for results.jsonl (default: print only)",
        force="accept weights that are not those the plan or the SAE was made for; replace results "
        "in --out",
    )
