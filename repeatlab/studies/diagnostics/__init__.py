"""How long the parts of an update take, and what a run of them would."""
