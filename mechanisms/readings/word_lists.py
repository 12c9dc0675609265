"""Words that weights are read by: instruction verbs, other verbs, and some fields."""

from collections.abc import Sequence
from pathlib import Path

from saesteer.checkpoints.errors import UserError
from saesteer.steering.tasks.contents import read_text

INSTRUCTION_VERBS = tuple(
    """write summarize translate explain describe list rewrite classify generate compare create
    answer identify suggest provide compose edit define calculate analyze outline design propose
    evaluate recommend convert extract paraphrase predict categorize construct correct discuss
    estimate formulate give name organize rank simplify solve state""".split()
)
OTHER_VERBS = tuple(
    """walk eat sleep run sit stand fall drink drive climb swim fly burn break bring buy carry catch
    cook cross cry dance die dig drag draw dream drop enter escape feed fight fill float flow follow
    freeze grow hang hear hide hit hold hunt hurt jump kick kill kiss knock laugh lean leave lie
    lift lose love marry melt move open pass pay pull push rain reach ride ring rise roll rush sail
    sell send shake shine shoot shout shut sing sink smell smile smoke spend spread steal stick stop
    strike sweep swing throw touch travel turn visit wait wake wash watch wear win wonder work
    worry""".split()
)
FIELDS = {
    "writing": tuple(
        """write writing story essay poem paragraph sentence letter author novel article chapter
        text word narrative draft journal blog grammar style""".split()
    ),
    "code": tuple(
        """code function class variable loop array string return python script program compile
        import method object integer boolean syntax debug software""".split()
    ),
    "maths": tuple(
        """number sum equation multiply divide angle triangle matrix algebra fraction integral
        theorem proof geometry percent square ratio calculate formula decimal""".split()
    ),
    "translation": tuple(
        """translate translation language french german spanish english chinese japanese italian
        bilingual dialect vocabulary foreign latin arabic russian interpreter dictionary
        phrase""".split()
    ),
}


def frequent_words(n: int) -> list[str]:
    """The most frequent English words of letters alone, longer than one letter."""
    from wordfreq import top_n_list

    return [w for w in top_n_list("en", 2 * n) if w.isascii() and w.isalpha() and len(w) > 1][:n]


def read_words(path: str | Path) -> list[str]:
    """Words of a file, one a line. Raises UserError for none."""
    words = [line.strip() for line in read_text(Path(path), "`words`").split("\n") if line.strip()]
    if not words:
        raise UserError(f"{path} holds no word: write one a line")
    return list(dict.fromkeys(words))


def matched_verbs(verbs: Sequence[str], pool: Sequence[str]) -> list[str]:
    """For each verb the one of the pool nearest to it in frequency, each taken once."""
    from wordfreq import zipf_frequency

    left = [word for word in pool if word not in set(verbs)]
    found = []
    for verb in verbs:
        if not left:
            break
        near = min(left, key=lambda word: abs(zipf_frequency(word, "en")
                                              - zipf_frequency(verb, "en")))  # fmt: skip
        left.remove(near)
        found.append(near)
    return found
