"""The type that names a place in a language model whose activations are read."""

Place = tuple[int, str]
"""Layer (a 0-based block) and site: `(12, "resid_post")`, or a module path for the site. Where
activations of several models are read, those of the second have "@2" after their site."""


def of_model(place: Place, number: int) -> Place:
    """The place of model `number`, counted from 0."""
    layer, site = place
    return (layer, f"{site}@{number + 1}") if number else place


def without_model(place: Place) -> tuple[Place, int]:
    """The place in its own model, and the model's number, counted from 0."""
    layer, site = place
    name, at, number = site.rpartition("@")
    return ((layer, name), int(number) - 1) if at and number.isdigit() else (place, 0)
