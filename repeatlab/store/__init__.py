"""The run store: what a run writes, and how it is read again."""

from repeatlab import require_lab

require_lab()
