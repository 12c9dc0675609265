"""How strong a plan should be: by success and damage, or in nats."""
