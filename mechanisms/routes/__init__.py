"""Routes by which a prompt reaches the answer: the frozen network and traces in it."""
