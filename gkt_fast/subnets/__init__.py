"""Which subnets of a network there are, which are drawn, and what running them together costs. No torch here."""
