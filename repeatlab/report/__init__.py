"""What comes out of the store: executed notebooks and the paper."""
