"""What the records say: frames, paired differences, statistics, hypotheses. Never imports torch."""
