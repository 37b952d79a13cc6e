"""repeatlab: loss-driven dynamic batch repetition, compared fairly."""
