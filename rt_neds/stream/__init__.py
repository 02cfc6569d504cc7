"""The hot path. Read in this order: receiver, binner, decoder, publisher, loop."""
