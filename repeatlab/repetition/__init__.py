"""The primitive: each batch as often as its loss asks. Needs torch and numpy alone."""
