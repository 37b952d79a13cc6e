"""Many runs: studies, workers, lock-step, search, checks and measurements."""
