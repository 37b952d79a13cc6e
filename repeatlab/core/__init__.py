"""What every wing stands on: validation, random streams, files and locks, signals, the clock."""
