"""The run store: what a run writes, and how it is read again."""
