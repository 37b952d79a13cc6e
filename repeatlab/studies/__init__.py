"""Many runs: studies, workers, lock-step, checks and measurements."""

from repeatlab import require_lab

require_lab()
