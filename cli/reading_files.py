"""Files of the verbs that read a model: trace, attribute, probe and diff."""

from argparse import Namespace
from typing import TYPE_CHECKING

from saesteer.cli.inputs import take_folder
from saesteer.cli.output import Document, write_run

if TYPE_CHECKING:
    from saesteer.mechanisms.reports.saving import Reading


def keep_reading(args: Namespace, verb: str, result: "Reading", *facts: str) -> Document:
    """The document of a result, which is written into `--out` where that is given.

    `facts` are the keys of the document that run.json repeats.
    """
    if args.out is None:
        return result.document()
    from saesteer.mechanisms import save_reading

    folder = take_folder(args)
    document = save_reading(folder, result)
    write_run(folder, verb, vars(args), **{name: document[name] for name in facts})
    return document
