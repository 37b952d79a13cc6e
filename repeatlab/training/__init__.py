"""One run, from its configuration to its records."""

from repeatlab import require_lab

require_lab()
