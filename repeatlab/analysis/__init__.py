"""What the records say: frames, paired differences, statistics, hypotheses. Never imports torch."""

from repeatlab import require_lab

require_lab()
