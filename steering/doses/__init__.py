"""The strength of a plan, chosen by success and damage, or as a cost in nats."""
