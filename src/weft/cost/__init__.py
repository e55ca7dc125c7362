"""How long and how much: cost models behind one protocol. No torch."""
