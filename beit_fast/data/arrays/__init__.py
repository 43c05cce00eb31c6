"""Images of any number of channels and any depth: read as float arrays in [0, 1], on the CPU."""
