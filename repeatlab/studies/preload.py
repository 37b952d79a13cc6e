"""Imported by the process whose copies become workers (`multiprocessing.forkserver`)."""

import atexit
import gc

from repeatlab.studies.warm_imports import import_libraries

import_libraries("distributed")
# Copies share the pages of what no collection of theirs looks at.
gc.freeze()
# Its last collection is to find all: libraries complain of what is left.
atexit.register(gc.unfreeze)
