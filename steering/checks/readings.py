"""The readings of a reply on which a check may pass loosely."""


def loose_variants(output: str) -> list[str]:
    """The reply in IFEval's eight readings: {as it is, without `*`} times {whole, without its
    first line, its last, both}. Zhou et al., arXiv 2311.07911, section 2.2.
    """
    lines = output.split("\n")
    cuts = (
        output,
        "\n".join(lines[1:]).strip(),
        "\n".join(lines[:-1]).strip(),
        "\n".join(lines[1:-1]).strip(),
    )
    return [*cuts, *(cut.replace("*", "") for cut in cuts)]
