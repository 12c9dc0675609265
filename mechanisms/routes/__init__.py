"""Routes by which a prompt reaches the answer: the frozen network, traces, instruction vectors."""
