"""`saesteer serve`: an OpenAI-compatible server with a plan for each request, and a playground."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, add_model, default, given
from saesteer.cli.inputs import open_model
from saesteer.cli.output import print_json
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import count, number, seed
from saesteer.steering.serving.config import ServeConfig

if TYPE_CHECKING:
    from saesteer.checkpoints.sae_file import SAE
    from saesteer.sae.model.language_model import LanguageModel
    from saesteer.steering.plans.plan import Plan
    from saesteer.steering.serving.latent_search import LatentSearch

EXAMPLE = "saesteer serve --plan french=runs/plan --sae runs/sae"

KEY_VARIABLE = "SAESTEER_API_KEY"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is served")
    add_model(what, "(default: the one the first plan or the SAE names)")
    what.add_argument(
        "--plan",
        action=Repeated,
        metavar="NAME=PATH",
        help="a plan that requests may name; repeatable",
    )
    what.add_argument(
        "--sae",
        metavar="DIR",
        help="SAE whose latents requests may steer with and watch: folder or file, or RELEASE:ID "
        "of sae_lens (default: none)",
    )
    what.add_argument(
        "--latents",
        metavar="DIR",
        help="folder with the latents.jsonl of this SAE, by which the playground searches "
        "(default: tokens by the logit lens)",
    )
    what.add_argument(
        "--name",
        metavar="NAME",
        help="what requests call the model (default: its name, or that of its folder)",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--host", metavar="ADDRESS", help=f"address to listen at {default(ServeConfig, 'host')}"
    )
    where.add_argument(
        "--port",
        type=seed,
        metavar="N",
        help=f"port to listen at; 0 takes a free one {default(ServeConfig, 'port')}",
    )
    where.add_argument(
        "--api-key",
        metavar="KEY",
        help="what requests must bring as `Authorization: Bearer KEY`; needed where other machines "
        f"can reach the server (default: {KEY_VARIABLE}, else none)",
    )
    much = parser.add_argument_group("how much at a time")
    much.add_argument(
        "--max-batch",
        type=count,
        metavar="N",
        help=f"answers that are generated together {default(ServeConfig, 'max_batch')}",
    )
    much.add_argument(
        "--queue",
        type=seed,
        metavar="N",
        help=f"answers that may wait; more get status 429 {default(ServeConfig, 'queue')}",
    )
    much.add_argument(
        "--cache-tokens",
        type=count,
        metavar="N",
        help="tokens, with padding, that the caches of all answers may hold "
        f"{default(ServeConfig, 'cache_tokens')}",
    )
    much.add_argument(
        "--prefill-tokens",
        type=count,
        metavar="N",
        help="tokens of prompts, with padding, in one pass "
        f"{default(ServeConfig, 'prefill_tokens')}",
    )
    much.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help=f"longest answer {default(ServeConfig, 'max_new_tokens')}",
    )
    much.add_argument(
        "--deadline",
        type=number,
        metavar="S",
        help="seconds in which a request is answered, or fails with status 504 "
        f"{default(ServeConfig, 'deadline')}",
    )
    add_common(
        parser,
        out=None,
        force="accept weights that are not those a plan or the SAE was made for",
        seed_help=None,
    )


def run(args: Namespace) -> int:
    """Serve until told to stop."""
    from saesteer.steering.serving.routes.server import check_installed, listen, run, url_of

    check_installed()
    config = _config(args)
    paths = _named(args.plan or ())
    if args.latents is not None and args.sae is None:
        raise UsageError("--latents describes the latents of --sae: give both")
    with listen(config) as sock:
        with reporting(args) as report:
            app = _app(args, config, paths, report)

        def ready() -> None:
            url = url_of(sock)
            if args.json:  # on a line of its own: the reader does not wait for the end
                plans = list(app.shelf.plans)
                print_json({"url": url, "model": app.name, "plans": plans}, one_a_line=True)
            else:
                print(f"serving {app.name} at {url}/v1, playground at {url}/ (end with Ctrl-C)")
            sys.stdout.flush()

        run(app.app(), sock, ready)
    return 0


def _config(args: Namespace) -> ServeConfig:
    values = given(args, ServeConfig)
    if args.api_key is None and (key := os.environ.get(KEY_VARIABLE)):
        values["api_key"] = key
    return ServeConfig(**values)


def _named(plans: tuple[str, ...]) -> dict[str, str]:
    """The paths of `--plan`, by name."""
    from saesteer.steering.serving.config import check_plan_name

    found: dict[str, str] = {}
    for one in plans:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--plan must be NAME=PATH, such as french=runs/plan, got {one!r}")
        check_plan_name(name)
        if name in found:
            raise UsageError(f"--plan names two plans {name}: give each a name of its own")
        found[name] = path
    return found


def _app(args: Namespace, config: ServeConfig, paths: dict[str, str], report: Report) -> Any:
    """The application: everything opened and checked."""
    from saesteer.steering.plans.plan_file import load_plan
    from saesteer.steering.serving.routes.api import SteeringApp
    from saesteer.steering.serving.routes.shelf import Shelf

    plans: dict[str, Plan] = {name: load_plan(path) for name, path in paths.items()}
    sae = _open_sae(args, report)
    names = [plan.model.name for plan in plans.values()]
    if sae is not None:
        names.append(sae.spec.model_name)
    lm = open_model(args, report, name=next(filter(None, names), None))
    shelf = Shelf(lm, plans, None if sae is None else sae.to(lm.device), force=args.force)
    search = _search(args, lm, sae, report)
    return SteeringApp(lm, shelf, config, name=args.name or _short(lm.name), search=search)


def _open_sae(args: Namespace, report: Report) -> "SAE | None":
    from saesteer.checkpoints.sae_file import load_sae

    if args.sae is None:
        return None
    report.say(f"loading {args.sae}")
    return load_sae(args.sae)


def _search(
    args: Namespace, lm: "LanguageModel", sae: "SAE | None", report: Report
) -> "LatentSearch | None":
    from saesteer.steering.serving.latent_search import lens_cards, read_cards

    if sae is None:
        return None
    if args.latents is not None:
        return read_cards(args.latents, sae.spec.d_sae)
    return lens_cards(lm, sae, force=args.force, progress=report)


def _short(name: str) -> str:
    """A model's name without the folders in front of it."""
    return Path(name).name if Path(name).expanduser().exists() else name
