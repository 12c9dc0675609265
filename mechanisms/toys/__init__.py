"""Small models whose mechanism is known."""
