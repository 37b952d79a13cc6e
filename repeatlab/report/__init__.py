"""What comes out of the store: executed notebooks and the paper."""

from repeatlab import require_lab

require_lab()
